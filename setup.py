"""Installs mmkd_plugin, and none of the packages it plugs into.

mmengine, mmcv, mmdet and mmpretrain are not named here, because the same import names come from two families of
packages (docs/stacks.md), and pip would put one over the other. The import of mmkd_plugin says which one is missing.
"""
import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r"__version__ = '(.+)'", (here / 'mmkd_plugin/__init__.py').read_text()).group(1)

setup(
    name='mmkd_plugin',
    version=version,
    description='AMD and SoKD knowledge distillation for MMDetection and MMPretrain',
    long_description=(here / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmkd_plugin', 'mmkd_plugin.*']),
    # links to configs/, tools/ and model-index.yml, where OpenMMLab's tools look; a wheel has the files themselves
    package_data={'mmkd_plugin': ['.mim/*.yml', *(f'.mim/configs/**/*.{end}' for end in ('yml', 'md', 'py')),
                                  '.mim/tools/**/*']},
    exclude_package_data={'mmkd_plugin': ['.mim/tools/**/__pycache__/*', '.mim/configs/**/__pycache__/*']},
    python_requires='>=3.10',
    classifiers=[f'Programming Language :: Python :: {version}' for version in ('3.10', '3.11', '3.12')],
    install_requires=[
        'torch>=2.1',
        'mmrazor==1.0.0',
        # needed by mmrazor, which does not declare them
        'joblib',
        'ordered_set',
        # needed by onedl-mmdetection, which does not declare it
        'six',
    ],
    extras_require={
        'digits': ['scikit-learn'],  # the embedded data set of the demo
        'onnx': ['onnx', 'onnxruntime'],  # tools/export_student.py --onnx
    },
)
