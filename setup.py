"""Installs mmkd_plugin; the ranges admit every OpenMMLab stack it is known to work on, and change none."""
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
    package_data={'mmkd_plugin': ['.mim/*.yml', '.mim/configs/**/*.yml', '.mim/configs/**/*.py', '.mim/tools/*']},
    python_requires='>=3.10',
    install_requires=[
        'torch>=2.0',
        'mmengine>=0.8.3,<1.0.0',
        'mmcv>=2.0.0rc4,<2.2.0',
        'mmdet>=3.0.0,<3.4.0',
        'mmpretrain>=1.0.0,<1.3.0',
        'mmrazor==1.0.0',
        # needed by mmrazor, which does not declare them
        'joblib',
        'ordered_set',
    ],
    extras_require={
        'digits': ['scikit-learn'],  # the embedded data set of the demo
    },
)
