"""Writes what is said about the configs elsewhere from the configs: configs/metafile.yml and the tables of docs/.

Whatever can be read from a config is. Results are those of the README, which were measured here, and those of
the papers, under a name that says so.
"""
import re
import sys
from pathlib import Path

import yaml
from mmengine.config import Config

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools'))
from demo import ARMS, LABELS  # noqa: E402

METAFILE = 'configs/metafile.yml'
NOT_MEASURED = 'Results of the paper, not measured here'
DATA = {'coco': 'COCO', 'imagenet': 'ImageNet-1k', 'cifar100': 'CIFAR-100', 'cifar10': 'CIFAR-10', 'digits': 'Digits'}
METHODS = {'mmkd_plugin.AMDDistiller': 'AMD', 'mmkd_plugin.SoKDDistiller': 'SoKD'}
PAPERS = {
    'AMD': dict(URL='https://arxiv.org/abs/2302.14130',
                Title='Leveraging Angular Distributions for Improved Knowledge Distillation'),
    'SoKD': dict(URL='https://arxiv.org/abs/2409.18785',
                 Title='Student-Oriented Teacher Knowledge Refinement for Knowledge Distillation'),
}
PAPER_RESULTS = {
    'sokd_resnet_imagenet': {'Top 1 Accuracy': 72.53, 'Top 1 Accuracy of ReviewKD alone': 71.61},
    'sokd-fitnet_resnet50-mobilenetv2_cifar100': {'Top 1 Accuracy gained over FitNet alone': 3.96},
}


def main() -> None:
    for path, text in pages().items():
        (ROOT / path).write_text(text)


def pages() -> dict[str, str]:
    """Returns what the files should hold, by their path from the root of the repository."""
    files = [*(ROOT / 'configs').glob('*.py'), *(ROOT / 'configs/digits').glob('*.py')]
    models = sorted((entry(file) for file in files),
                    key=lambda model: ([*DATA.values()].index(model['Metadata']['Training Data']), model['Name']))
    collections = [dict(Name=method, Paper=paper, README=f'../docs/{method.lower()}.md')
                   for method, paper in PAPERS.items()]
    found = {METAFILE: '# Written by tools/dev/make_model_index.py from the configs.\n' + yaml.safe_dump(
        dict(Collections=collections, Models=models), sort_keys=False, width=1000)}
    for method in PAPERS:
        page = f'docs/{method.lower()}.md'
        rows = table([model for model in models if model.get('In Collection') == method])
        found[page], count = re.subn(r'(?<=\n## Configs\n\n)(\|.*\n)+', lambda _, rows=rows: rows,
                                     (ROOT / page).read_text())
        if count != 1:
            raise ValueError(f'{page}: expected one table after the heading "## Configs", found {count}')
    return found


def entry(file: Path) -> dict:
    """Returns what OpenMMLab's tools are told of a config."""
    cfg = Config.fromfile(file)
    out = dict(Name=file.stem)
    if METHODS.get(cfg.model.get('distiller', {}).get('type')):
        out['In Collection'] = METHODS[cfg.model.distiller.type]
    out['Config'] = relative(file)
    out['Metadata'] = {'Training Data': data(cfg, file), 'Epochs': cfg.train_cfg.max_epochs}
    if 'teacher' in cfg.model:
        path = cfg.model.teacher.cfg_path
        teacher = dict(Config=path if '::' in path else relative(Path(path)))
        if '://' in cfg.model.teacher_ckpt:  # else it is to be trained first
            teacher['Weights'] = cfg.model.teacher_ckpt
        out['Metadata'].update(Student=dict(Config=student(file)), Teacher=teacher)
    if file.stem in PAPER_RESULTS:
        out['Metadata'][NOT_MEASURED] = PAPER_RESULTS[file.stem]
    measured = box_ap(out['Config'])
    if measured:
        out['Results'] = [{'Task': 'Object Detection', 'Dataset': out['Metadata']['Training Data'],
                           'Metrics': {'box AP': measured}}]
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
    """Returns the config that a distillation builds on: the first of its bases that is none itself."""
    for base in Config._get_base_files(str(file)):
        if '::' in base:
            return base
        inherited = file.parent / base
        model = Config.fromfile(inherited).get('model', {})
        if model:
            return student(inherited) if 'teacher' in model else relative(inherited)
    raise ValueError(f'{file}: none of its bases has a student')


def box_ap(config: str) -> float | None:
    """Returns the AP, in percent, that the README's table has for a config of the demo."""
    labels = [LABELS[arm] for arm, path in ARMS.items() if path == config]
    row = re.search(rf'^\| {re.escape(labels[0])} \| (0\.\d+)', (ROOT / 'README.md').read_text(),
                    re.MULTILINE) if labels else None
    return round(100 * float(row[1]), 1) if row else None


def table(models: list[dict]) -> str:
    """Returns the Markdown table of a method's configs."""
    lines = ['| command | what | teacher | student |', '|---|---|---|---|']
    for model in models:
        what = first_sentence(ROOT / model['Config'])
        paper = model['Metadata'].get(NOT_MEASURED)
        if paper:
            what += f' {NOT_MEASURED}: {", ".join(f"{name} {value}" for name, value in paper.items())}.'
        networks = [model['Metadata'][role]['Config'] for role in ('Teacher', 'Student')]
        names = [Path(path).stem if '::' in path else path for path in networks]
        lines.append(f'| `python tools/train.py {model["Config"]}` | {what} | `{names[0]}` | `{names[1]}` |')
    return '\n'.join(lines) + '\n'


def first_sentence(file: Path) -> str:
    comment = re.match(r'(# .*\n)+', file.read_text())
    if not comment:
        raise ValueError(f'{file}: expected a comment at its top that says what it is')
    return re.split(r'(?<=\.)\s', comment[0].replace('# ', '').replace('\n', ' '))[0]


if __name__ == '__main__':
    main()
