"""Writes metafile.yml and the table of README.md in configs/amd and configs/sokd from the configs."""
import re
from pathlib import Path

import yaml
from mmengine.config import Config

from mmkd_plugin.config.teachers import teachers_in

ROOT = Path(__file__).parents[2]
NOT_MEASURED = 'Results of the paper, not measured here'
DATA = {'coco': 'COCO', 'imagenet': 'ImageNet-1k', 'cifar100': 'CIFAR-100', 'cifar10': 'CIFAR-10'}
METHODS = {'amd': 'AMD', 'sokd': 'SoKD'}
PAPERS = {
    'AMD': dict(URL='https://arxiv.org/abs/2302.14130',
                Title='Leveraging Angular Distributions for Improved Knowledge Distillation'),
    'SoKD': dict(URL='https://arxiv.org/abs/2409.18785',
                 Title='Student-Oriented Teacher Knowledge Refinement for Knowledge Distillation'),
}
PAPER_RESULTS = {
    'sokd-reviewkd_backbone_resnet34_resnet18_8xb32_in1k': {
        'Top 1 Accuracy': 72.53, 'Top 1 Accuracy of ReviewKD alone': 71.61},
    'sokd-fitnet_backbone_resnet50_mobilenetv2_b64_cifar100': {'Top 1 Accuracy gained over FitNet alone': 3.96},
}
BEGIN = '<!-- tools/dev/make_model_index.py writes what follows -->\n'


def main() -> None:
    for path, text in pages().items():
        (ROOT / path).write_text(text)


def pages() -> dict[str, str]:
    """Returns the content of the files, by their path from the root of the repository."""
    found = {}
    for folder, method in METHODS.items():
        models = [entry(file, method) for file in distillations(folder)]
        collection = dict(Name=method, Paper=PAPERS[method], README='README.md')
        found[f'configs/{folder}/metafile.yml'] = (
            '# Written by tools/dev/make_model_index.py from the configs.\n'
            + yaml.safe_dump(dict(Collections=[collection], Models=models), sort_keys=False, width=1000))
        readme = f'configs/{folder}/README.md'
        text, mark, _ = (ROOT / readme).read_text().partition(BEGIN)
        if not mark:
            raise ValueError(f'{readme}: expected the line {BEGIN.strip()!r}')
        found[readme] = text + mark + table(models)
    return found


def distillations(folder: str) -> list[Path]:
    """Returns the configs of a method by data set; those with short names come first."""
    return [*sorted((ROOT / 'configs').glob(f'{folder}_*.py')),
            *(file for data in ('coco', 'imagenet', 'cifar')
              for file in sorted((ROOT / 'configs' / folder / data).glob('*.py')))]


def entry(file: Path, method: str) -> dict:
    """Returns a config's entry for OpenMMLab's tools."""
    cfg = Config.fromfile(file)
    teachers = []
    for _, teacher, weights in teachers_in(cfg.model):
        path = teacher.cfg_path
        teachers.append(dict(Config=path if '::' in path else relative(Path(path))))
        if '://' in weights:  # otherwise the user trains it first
            teachers[-1]['Weights'] = weights
    out = {'Name': file.stem, 'In Collection': method, 'Config': relative(file), 'Metadata': {
        'Training Data': data(cfg, file), 'Epochs': cfg.train_cfg.max_epochs,
        'Student': dict(Config=student(file)),
        **(dict(Teacher=teachers[0]) if len(teachers) == 1 else dict(Teachers=teachers))}}
    if file.stem in PAPER_RESULTS:
        out['Metadata'][NOT_MEASURED] = PAPER_RESULTS[file.stem]
    return out


def relative(file: Path) -> str:
    return file.resolve().relative_to(ROOT.resolve()).as_posix()


def data(cfg: Config, file: Path) -> str:
    dataset = cfg.train_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    root = Path(dataset.data_root).name
    if root not in DATA:
        raise ValueError(f'{file}: expected the name of data_root to be one of {", ".join(DATA)}, got {root!r}')
    return DATA[root]


def student(file: Path) -> str:
    """Returns the student's config of a distillation: the first of its bases that is not a distillation itself."""
    for base in Config._get_base_files(str(file)):
        if '::' in base:
            return base
        inherited = (file.parent / base).resolve()
        model = Config.fromfile(inherited).get('model', {})
        if model:
            return student(inherited) if 'teacher' in model else relative(inherited)
    raise ValueError(f'{file}: none of its bases has a student')


def table(models: list[dict]) -> str:
    """Returns the Markdown table of a method's configs."""
    lines = ['| config | what | teacher | student |', '|---|---|---|---|']
    for model in models:
        what = first_sentence(ROOT / model['Config'])
        paper = model['Metadata'].get(NOT_MEASURED)
        if paper:
            what += f' {NOT_MEASURED}: {", ".join(f"{name} {value}" for name, value in paper.items())}.'
        metadata = model['Metadata']
        teachers = ', '.join(map(shown, metadata.get('Teachers') or [metadata['Teacher']]))
        lines.append(f'| `{model["Config"]}` | {what} | {teachers} | {shown(metadata["Student"])} |')
    return '\n'.join(lines) + '\n'


def shown(network: dict) -> str:
    path = network['Config']
    return f'`{Path(path).stem if "::" in path else path}`'


def first_sentence(file: Path) -> str:
    comment = re.match(r'(# .*\n)+', file.read_text())
    if not comment:
        raise ValueError(f'{file}: expected a comment at the top that describes the config')
    return re.split(r'(?<=\.)\s', comment[0].replace('# ', '').replace('\n', ' '))[0]


if __name__ == '__main__':
    main()
