"""The report of a student as one HTML page with pictures."""
import base64
from html import escape

from .pictures import THRESHOLD
from .report import COLUMNS, LABELS

_STYLE = '''
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2733; max-width: 1500px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid #d8dfe6; }
th, td { text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
.sheet { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 280px); gap: .6rem; margin-bottom: 1rem; }
figure { margin: 0; } img { width: 100%; } figcaption { font-size: .85rem; color: #50606f; }
'''


def page(report: dict, rows: list[list[str]], sheets: list[dict[str, bytes]]) -> str:
    """Returns the page.

    Args:
        report: content of ``student.json``.
        rows: table rows of :data:`COLUMNS`.
        sheets: pictures of :func:`draw`.
    """
    where = report['environment']
    about = dict(config=report['config'], checkpoint=report['checkpoint'], data=report['data'],
                 commit=where['commit'], device=where['device'], threads=where['threads'], torch=where['torch'],
                 mmdet=where['mmdet'], mmpretrain=where['mmpretrain'])
    size = ' x '.join(map(str, report['input'][2:]))
    body = [
        '<h1>Student: accuracy and cost</h1>', _table(COLUMNS, rows),
        f'<p>Latency is measured on one image of {size}, from its pixels to detections or scores, on '
        f'{where["device"]}, threads: {where["threads"]}.</p>', *_int8(report), '<h2>Predictions</h2>',
        *(_sheet(sheet) for sheet in sheets)]
    body.append('<p>The test images are missing, so there are no pictures.</p>' if not sheets else
                f'<p>Detections with a score above {THRESHOLD}, and the most likely class of a classifier.</p>')
    body += ['<h2>Config and environment</h2>', _table(None, [[name, str(value)] for name, value in about.items()])]
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Student report</title>'
            f'<style>{_STYLE}</style></head>\n<body>\n' + '\n'.join(body) + '\n</body></html>\n')


def _table(header: list[str] | None, rows: list[list[str]]) -> str:
    head = '' if header is None else '<tr>' + ''.join(f'<th>{escape(cell)}</th>' for cell in header) + '</tr>\n'
    return '<table>\n' + head + '\n'.join(
        '<tr>' + ''.join(f'<td>{escape(cell)}</td>' for cell in row) + '</tr>'
        for row in rows) + '\n</table>'


def _int8(report: dict) -> list[str]:
    found = report.get('int8')
    if not found:
        return []
    kept = ', '.join(found['left_in_float']) or 'none'
    return [f'<p>In eight bits {escape(found["metric"])} goes from {found["float"]:.2f} to {found["int8"]:.2f} points, '
            f'calibrated with {found["calibrated_with"]} images. Layers left in float: {escape(kept)}.</p>']


def _sheet(sheet: dict[str, bytes]) -> str:
    return '<div class="sheet">' + ''.join(
        f'<figure><img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f'<figcaption>{escape(LABELS.get(name, name))}</figcaption></figure>' for name, png in sheet.items()) + '</div>'
