import ast
import sys

import cv2
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])
about = session.get_modelmeta().custom_metadata_map
image = cv2.cvtColor(cv2.imread(sys.argv[2]), cv2.COLOR_BGR2RGB)
scale, (height, width) = ast.literal_eval(about['scale']), image.shape[:2]
factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
image = cv2.resize(image, (int(width * factor + 0.5), int(height * factor + 0.5)))
if 'pad' in about:  # images are padded on the right and at the bottom
    size, value = ast.literal_eval(about['pad']), ast.literal_eval(about['pad_with'])
    down, right = size[1] - image.shape[0], size[0] - image.shape[1]
    image = cv2.copyMakeBorder(image, 0, down, 0, right, cv2.BORDER_CONSTANT, value=value)
images = np.ascontiguousarray(image.transpose(2, 0, 1)[None], about['dtype'])
feeds = dict(images=images, image_sizes=np.array([images.shape[2:]]))
boxes, scores, labels = (output[0] for output in session.run(None, feeds))
classes = ast.literal_eval(about['classes'])
for box, score, label in zip(boxes / factor, scores, labels):
    if score > 0.3:
        print(classes[label], f'{score:.2f}', box.astype(float).round(1).tolist())
