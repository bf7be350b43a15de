"""Converts torchvision's weights of MobileNetV2 to the names of MMDetection's and MMPretrain's backbone.

FILE is a state dict of torchvision, such as mobilenet_v2-b0353104.pth, under the BSD licence. The classifier is left
out.
"""
import argparse
import re
import sys
from pathlib import Path

import torch

from mmkd_plugin.checkpoints.reading import read_weights

BLOCKS = (1, 2, 3, 4, 3, 3, 1)  # inverted residuals of layer1 to layer7
PLACES = [f'layer{layer}.{block}' for layer, blocks in enumerate(BLOCKS, 1) for block in range(blocks)]
PARTS = {
    'without expansion': {'0.0': 'depthwise_conv.conv', '0.1': 'depthwise_conv.bn', '1': 'linear_conv.conv',
                          '2': 'linear_conv.bn'},
    'with expansion': {'0.0': 'expand_conv.conv', '0.1': 'expand_conv.bn', '1.0': 'depthwise_conv.conv',
                       '1.1': 'depthwise_conv.bn', '2': 'linear_conv.conv', '3': 'linear_conv.bn'},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('file', type=Path, help='weights of torchvision')
    parser.add_argument('--out', type=Path, default=Path('data/mobilenet_v2.pth'), help='file to write')
    args = parser.parse_args()
    try:
        weights = read_weights(str(args.file), 'file')
        converted = {convert(key): value for key, value in weights.items() if not key.startswith('classifier.')}
    except (OSError, ValueError) as error:
        sys.exit(f'mobilenet_v2: {error}')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=converted), args.out)
    print(f'{args.out}: {len(converted)} tensors')


def convert(key: str) -> str:
    """Converts a parameter's name from torchvision to the backbone.

    Raises:
        ValueError: torchvision's MobileNetV2 does not have this name.
    """
    found = re.fullmatch(r'features\.(\d+)\.(?:conv\.)?([\d.]+)\.(\w+)', key)
    number, place = (int(found[1]), found[2]) if found else (-1, '')
    if number in (0, 18):
        block, parts = 'conv1' if number == 0 else 'conv2', {'0': 'conv', '1': 'bn'}
    elif number == 1:
        block, parts = PLACES[0], PARTS['without expansion']
    elif number in range(2, 18):
        block, parts = PLACES[number - 1], PARTS['with expansion']
    else:
        parts = {}
    if place in parts:
        return f'{block}.{parts[place]}.{found[3]}'
    raise ValueError(f'{key!r} is not a name in torchvision\'s MobileNetV2')


if __name__ == '__main__':
    main()
