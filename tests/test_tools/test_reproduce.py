"""The numbers of the docs are those of the results, and all of them have a source."""

import json
import re
import shutil
from collections.abc import Sequence
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    """Import benchmarks/reproduce.py, which is no package's."""
    spec = spec_from_file_location('reproduce', ROOT / 'benchmarks' / 'reproduce.py')
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reproduce = load()
RESULTS, CLAIMS, SETTINGS = reproduce.read_claims()
PAGES = ['README.md', 'benchmarks/README.md']
PAGES += sorted(f'docs/{path.name}' for path in (ROOT / 'docs').glob('*.md'))
# What counts as measured: a number with a decimal point and three digits, one before a unit, and
# the numbers of a table's cell that has nothing else, unless they are whole ones without a unit.
DIGITS = re.compile(r'(?<![\w.])(?:[1-9]\d*\.\d{2,}|[1-9]\d+\.\d+)(?![\w.]*\.\d)(?=\D)')
UNITS = re.compile(
    r'(\d+(?:\.\d+)?)\*{0,2} (?:x(?! *\d)|times|ms|mIoU|(?:box |mask )?AP|GMACs|MiB)\b'
)
CELL = re.compile(r'(?<=\|)[\s\d.,/()x%*e-]+(?=\|)')
# No prose: fenced, indented and inline code, addresses, papers, the line above a table's rule.
OTHER = re.compile(
    r'^ *```.*?^ *```|(?<=\n\n)( {4,}(?![|\s])[^\n]*\n)+|`[^`\n]*`|\]\([^)]*\)|arXiv [\d.]+'
    r'|^ *\|[^\n]*\|(?=\n *\|[-| ]+\|$)',
    re.M | re.S,
)


@cache
def prose(page: str) -> str:
    """Return the text of a page, with blanks in place of what is none."""
    return OTHER.sub(lambda match: ' ' * len(match[0]), (ROOT / page).read_text())


def measured(page: str) -> dict[int, str]:
    """Return start and text of each measured number of a page."""
    text = prose(page)
    found = {match.start(): match[0] for match in DIGITS.finditer(text)}
    found |= {match.start(1): match[1] for match in UNITS.finditer(text)}
    for cell in CELL.finditer(text):
        if re.search(r'\d\.\d|%', cell[0]):
            numbers = re.finditer(reproduce.NUMBER, cell[0])
            found |= {cell.start() + match.start(): match[0] for match in numbers}
    return found


def spans(page: str) -> set[int]:
    """Return the starts of the numbers of a page that have a source or are settings."""
    text = (ROOT / page).read_text()
    starts = set()
    for claim in CLAIMS:
        if claim.page == page:
            for match in claim.pattern.finditer(text):
                starts |= {match.start(i + 1) for i in range(len(claim.sources))}
                starts |= set(range(match.start(), match.start(1)))  # the row's label
    for setting in SETTINGS.get(page, []):
        pattern = r'\s+'.join(map(re.escape, setting.split()))
        for match in re.finditer(pattern, text):
            starts |= set(range(*match.span()))
    return starts


def agrees(printed: str, value: float, percent: bool) -> bool:
    """Tell whether a number is a value, rounded to its digits."""
    if 'e' in printed:
        return printed == f'{value:.0e}'.replace('e-0', 'e-')
    digits = len(printed.partition('.')[2])
    return abs(float(printed) - value * (100 if percent else 1)) <= 0.5 * 10**-digits + 1e-5


@pytest.mark.parametrize('page', PAGES)
def test_numbers_are_those_of_the_results(page: str) -> None:
    text, wrong = (ROOT / page).read_text(), []
    for claim in (claim for claim in CLAIMS if claim.page == page):
        matches = list(claim.pattern.finditer(text))
        if not matches:
            wrong.append(f'not in the page: {claim.text}')
        for match in matches:
            for i, source in enumerate(claim.sources, 1):
                value = source.value(reproduce.RESULTS)
                if not agrees(match[i], value, text[match.end(i)] == '%'):
                    wrong.append(f'{match[i]} is {value:.5g} by {source.text}')
    assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('page', PAGES)
def test_every_measured_number_has_a_source(page: str) -> None:
    text, known = (ROOT / page).read_text(), spans(page)
    missing = [
        f'line {text.count(chr(10), 0, start) + 1}: {number}'
        for start, number in sorted(measured(page).items())
        if start not in known
    ]
    assert not missing, f'{page}\n' + '\n'.join(missing)


def test_what_counts_as_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (
        'At 0.7, 3 x 3, 512 x 512: 1.9 x, **54.46**, 12 ms.\n\n| a 0.5 | 24.4 / 3 | 8 | `1.25` |\n'
    )
    (tmp_path / 'page.md').write_text(text)
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    assert sorted(measured('page.md').values()) == ['1.9', '12', '24.4', '3', '54.46']


def test_every_result_is_claimed_or_said_not_to_be() -> None:
    listed = reproduce.yaml.safe_load(reproduce.CLAIMS.read_text())
    claimed = {name for claim in CLAIMS for name in claim.names}
    assert claimed == set(RESULTS) and not claimed & set(listed['not_claimed'])
    files = {reproduce.find(n, reproduce.RESULTS) for n in (*RESULTS, *listed['not_claimed'])}
    assert files == set(reproduce.RESULTS.rglob('*.json'))
    assert all(reproduce.command_of(name, RESULTS[name])[0] for name in RESULTS)


def call(capsys: pytest.CaptureFixture, code: int, *args: object) -> Sequence[str]:
    """Run the script, check its exit code, return its output's lines and the error's."""
    if code:
        with pytest.raises(SystemExit) as stop:
            reproduce.main([str(arg) for arg in args])
        assert stop.value.code == code
    else:
        reproduce.main([str(arg) for arg in args])
    return capsys.readouterr()


@pytest.mark.parametrize(('factor', 'code'), [(1.1, 0), (1.3, 1)])
def test_compares(factor: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Speed-ups may differ by 15%; what lies in the folder is not run again."""
    shutil.copytree(reproduce.RESULTS / 'winograd_r50', tmp_path / 'winograd_r50')
    file = tmp_path / 'winograd_r50' / 'benchmark.json'
    data = json.loads(file.read_text())
    data['rows'][1]['speed_up'] *= factor
    file.write_text(json.dumps(data))
    out = call(capsys, code, 'winograd_r50', '--out', tmp_path).out
    assert out.count('DIFFERS') == code and f'{code} numbers differ' in out
    assert 'not compared' in out  # ms


def test_runs_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes below another folder, with the recorded threads and the variables before it."""
    monkeypatch.setattr(reproduce, 'RESULTS', tmp_path)
    (tmp_path / 'a.json').write_text('{"setting": {"threads": 3}, "rows": []}')
    code = 'import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ["A"] + '
    code += 'os.environ["OMP_NUM_THREADS"])'
    command = f"A=7 -c '{code}' benchmarks/results/a.json"
    reproduce.run('a', dict(command=command), tmp_path / 'out')
    assert (tmp_path / 'out' / 'a.json').read_text() == '73'
    with pytest.raises(ValueError, match=r'a ended with code 1, see .*a\.log'):
        reproduce.run('a', dict(command="-c 'raise SystemExit(1)'"), tmp_path)
    with pytest.raises(ValueError, match='run by hand'):
        reproduce.run('a', dict(command='x.py $NOT_SET'), tmp_path)


def test_what_fits() -> None:
    names = reproduce.choose([], RESULTS, CLAIMS)
    chosen = list(reproduce.fitting(60, names, RESULTS))
    assert 'flops/spvit-swin-t' in chosen and 'study_upernet' not in chosen
    assert 50 < sum(RESULTS[name]['minutes'] for name in chosen) <= 60


def test_list(capsys: pytest.CaptureFixture) -> None:
    out = call(capsys, 0, 'docs/budgets.md', 'flops', '--list').out
    assert out.count('get_flops.py') == 4 and 'by hand' in out and 'winograd' not in out


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([], 'give names of results, --minutes or --list'),
        (['swin-z'], "NAME must be a result, a folder of them or a page, got 'swin-z'"),
    ],
)
def test_bad_input(args: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert call(capsys, 1, *args).err.strip().endswith(f'error: {message}')


def test_bad_source() -> None:
    with pytest.raises(ValueError, match='must be of one row, got 2'):
        reproduce.parse_source('swin-t_cpu: sparse median').value(reproduce.RESULTS)
    with pytest.raises(ValueError, match=r"a result must be in .*, got 'swin-z'"):
        reproduce.parse_source('swin-z: sparse median').value(reproduce.RESULTS)
