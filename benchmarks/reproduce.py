"""Runs again what the numbers of the docs come from, and prints what differs.

    python benchmarks/reproduce.py --list          # results, minutes, pages, commands
    python benchmarks/reproduce.py swin-t_cpu      # a result, a folder of them or those of a page
    python benchmarks/reproduce.py --minutes 60    # the shortest, as many as fit

``claims.yml`` quotes the pages and has, in place of each number, where in ``results`` its value is:

    {[mean|std|min|max] [RESULT[#TABLE]:] WORD... KEY}

It is the value of KEY in the row that has all words among its values; of a list the first counts,
and ``name=value`` asks for one key. `` / `` or `` - `` join two such terms; the second is of the
same result unless it names one. A test compares the pages with the files. This script compares the
files with new ones, which the recorded commands write into another folder.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

import yaml
from rich.console import Console
from rich.progress import Progress

from mmdynsparse.analysis.report import print_table
from mmdynsparse.utils.command_line.errors import one_line_errors

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / 'benchmarks' / 'claims.yml'
RESULTS = ROOT / 'benchmarks' / 'results'
NUMBER = r'\d+(?:\.\d+)?(?:e-\d+)?'
# By the end of the key: how far a new value may be from the recorded one, as a share of it or in
# points. Ratios of two times of one run are compared, times and what else is not named are not.
SHARES = {'gmacs': 0.001, 'ideal': 0.001, 'peak_mib': 0.05, 'speed_up': 0.15, 'ratio': 0.15}
SHARES |= {'speed-up whole': 0.15, 'median': 0.15}
POINTS = {'mIoU': 0.3, 'aAcc': 0.3, 'AP': 0.3}
AVERAGES = {'mean': mean, 'std': stdev, 'min': min, 'max': max}


@dataclass(frozen=True)
class Term:
    """One value of a result.

    Args:
        result: Name of the result, with ``#`` before the table if that is not ``rows``.
        words: What the row has among its values.
        key: The value's key, with dots into dicts.
        average: One of ``AVERAGES`` over several rows; '' for exactly one.
    """

    result: str
    words: tuple[str, ...]
    key: str
    average: str

    @property
    def name(self) -> str:
        """Name of the result."""
        return self.result.partition('#')[0]

    def value(self, folders: Sequence[Path]) -> float:
        """Return the value in the first of the folders that has the result."""
        files = [file for file in (find(self.name, folder) for folder in folders) if file]
        if not files:
            raise ValueError(f'a result must be in {RESULTS}, got {self.name!r}')
        data = json.loads(files[0].read_text())
        rows = data.get(self.result.partition('#')[2] or 'rows', [data])
        values = [float(at(row, self.key)) for row in rows if all(has(row, w) for w in self.words)]
        if not values or (len(values) > 1 and not self.average):
            raise ValueError(f'{self} must be of one row, got {len(values)}')
        return AVERAGES[self.average or 'mean'](values)


@dataclass(frozen=True)
class Source:
    """Where a number comes from: a term, or two with '/' or '-' between them."""

    text: str = field(compare=False)
    terms: tuple[Term, ...]
    operation: str

    def value(self, *folders: Path) -> float:
        """Return the number by the results of the first folder that has them."""
        first, *second = (term.value(folders) for term in self.terms)
        if not second:
            return first
        return first / second[0] if self.operation == '/' else first - second[0]

    def tolerance(self, expected: float, points: float | None) -> float | None:
        """Return how far from the expected value is near enough; None for times."""
        key = self.terms[0].key
        if key.endswith('median') and self.operation != '/':
            return None
        if key.endswith(tuple(POINTS)):
            return points or next(near for end, near in POINTS.items() if key.endswith(end))
        return next((abs(expected) * s for end, s in SHARES.items() if key.endswith(end)), None)


@dataclass(frozen=True)
class Claim:
    """Some text of a page and the sources of its numbers."""

    page: str
    text: str
    sources: tuple[Source, ...]

    @property
    def pattern(self) -> re.Pattern:
        """What finds the text in its page, with a group for each number."""
        parts = re.split(r'\{[^}]+\}', self.text)
        quoted = (r'\s+'.join(map(re.escape, re.split(r'\s+', part))) for part in parts)
        return re.compile(f'({NUMBER})'.join(quoted))

    @property
    def names(self) -> list[str]:
        """Name of the result of each term of each source."""
        return [term.name for source in self.sources for term in source.terms]


def find(name: str, folder: Path) -> Path | None:
    """Return the file of a result: its own, that of a tool, or the metrics of tools/test.py."""
    kinds = ('benchmark', 'study', 'flops', 'training')
    files = [folder / f'{name}.json', *(folder / name / f'{kind}.json' for kind in kinds)]
    files += sorted((folder / name).glob('*/*.json'), reverse=True)
    return next((file for file in files if file.is_file()), None)


def at(row: Mapping, key: str) -> object:
    """Return the value of a key, or of one with dots into dicts."""
    if key in row:
        return row[key]
    first, _, rest = key.partition('.')
    return at(row[first], rest)


def has(row: Mapping, word: str) -> bool:
    """Tell whether a row has a value, of any key or, written ``key=value``, of one."""
    key, equals, text = word.rpartition('=')
    values = [row.get(key)] if equals else row.values()
    return text in {str(v[0] if isinstance(v, list) and v else v) for v in values}


def parse_source(text: str, result: str = '') -> Source:
    """Parse what stands between braces; ``result`` is that of a text that names none."""
    first, operation, second = [*re.split(r' ([/-]) ', text), '', ''][:3]
    terms = []
    for part in filter(None, (first, second)):
        words = shlex.split(part)
        average = words.pop(0) if words[0] in AVERAGES else ''
        result = words.pop(0)[:-1] if words[0].endswith(':') else result
        terms.append(Term(result, tuple(words[:-1]), words[-1], average))
    return Source(text, tuple(terms), operation)


def read_claims() -> tuple[dict[str, dict], list[Claim], dict]:
    """Return results by name, claims, and by page what only looks like a measured number."""
    data = yaml.safe_load(CLAIMS.read_text())
    claims = []
    for pages, entries in data['claims'].items():
        for entry in entries:
            for text in entry['text'].strip().splitlines():
                fields = re.findall(r'\{([^}]+)\}', text)
                sources = tuple(parse_source(field, entry.get('of', '')) for field in fields)
                claims += [Claim(page, text.strip(), sources) for page in pages.split()]
    return data['results'], claims, data['settings']


def choose(names: Sequence[str], results: Mapping, claims: Sequence[Claim]) -> list[str]:
    """Return the results that are meant, the shortest first: a result, a folder or a page."""
    chosen = set()
    for name in names:
        found = {r for claim in claims if claim.page == name for r in claim.names}
        found |= {r for r in results if r == name or r.startswith(f'{name}/')}
        if not found:
            raise ValueError(f'NAME must be a result, a folder of them or a page, got {name!r}')
        chosen |= found
    return sorted(chosen or results, key=lambda name: results[name]['minutes'])


def runs_here(result: Mapping) -> bool:
    """Tell whether a result needs neither a person nor a variable that is not set."""
    return not result.get('by_hand') and '$' not in os.path.expandvars(result.get('command', ''))


def fitting(minutes: float, names: Sequence[str], results: Mapping) -> Iterator[str]:
    """Yield those that run by themselves and together fit, as long as one does."""
    for name in (name for name in names if runs_here(results[name])):
        minutes -= results[name]['minutes']
        if minutes < 0:
            return
        yield name


def command_of(name: str, result: Mapping) -> tuple[str, Mapping]:
    """Return the command that made a result, and the setting in its file."""
    setting = json.loads(find(name, RESULTS).read_text()).get('setting', {})
    return result.get('command') or setting['command'], setting


def run(name: str, result: Mapping, out: Path) -> None:
    """Run a result's command; it writes to ``out`` what it wrote to ``benchmarks/results``."""
    command, setting = command_of(name, result)
    command = command.strip().replace('benchmarks/results/', f'{out}/')
    if not runs_here(result):
        raise ValueError(f'{name} must be run by hand or its variables set, then: {command}')
    words = shlex.split(os.path.expandvars(command))
    env = {**os.environ, 'OMP_NUM_THREADS': str(setting.get('threads', 2))}
    while '=' in words[0]:
        key, _, value = words.pop(0).partition('=')
        env[key] = value
    log = out / f'{name}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('w') as file:
        call = [sys.executable, *words]
        done = subprocess.run(call, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise ValueError(f'{name} ended with code {done.returncode}, see {log}')


def reproduce(name: str, result: Mapping, claims: Sequence[Claim], out: Path) -> int:
    """Make a result unless it is there, print recorded and new numbers, count what differs."""
    start, rows = time.time(), []
    if find(name, out) is None:
        run(name, result, out)
    used = [(c.page, s) for c in claims for s in c.sources if name in {t.name for t in s.terms}]
    for source in dict.fromkeys(source for _, source in used):
        old, new = source.value(RESULTS), source.value(out, RESULTS)
        near = source.tolerance(old, result.get('tolerance'))
        verdict = 'not compared' if near is None else f'within {near:.3g}'
        if near is not None and abs(new - old) > near + 1e-9:
            verdict = f'DIFFERS by {abs(new - old):.3g}, allowed {near:.3g}'
        pages = ', '.join(dict.fromkeys(page for page, other in used if other == source))
        rows.append((source.text, pages, f'{old:.5g}', f'{new:.5g}', verdict))
    title = f'{name}, {(time.time() - start) / 60:.1f} min'
    print_table(title, ('value', 'pages', 'recorded', 'now', 'verdict'), rows)
    return sum('DIFFERS' in row[-1] for row in rows)


def print_list(names: Sequence[str], results: Mapping, claims: Sequence[Claim]) -> None:
    """Print minutes, pages, number of their numbers and command of each result."""
    rows = []
    for name in names:
        used = [claim for claim in claims if name in claim.names]
        pages = ', '.join(dict.fromkeys(claim.page for claim in used))
        count = str(sum(claim.names.count(name) for claim in used))
        how = f'{results[name]["minutes"]:g}' + (' by hand' if results[name].get('by_hand') else '')
        rows.append((name, how, count, pages, command_of(name, results[name])[0].strip()))
    print_table('results', ('result', 'minutes', 'numbers', 'pages', 'command'), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run results again; exit code 1 says that something differs.

    Args:
        argv: Command line arguments. Defaults to None, those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('names', nargs='*', metavar='NAME', help='results, folders or pages')
    parser.add_argument('--list', action='store_true', help='print the results, run nothing')
    parser.add_argument('--minutes', type=float, help='only the shortest, as many as fit')
    parser.add_argument('--out', type=Path, help='folder; what it has already is only compared')
    args = parser.parse_args(argv)
    with one_line_errors(), Progress(console=Console(stderr=True)) as progress:
        results, claims, _ = read_claims()
        if not (args.names or args.list or args.minutes):
            raise ValueError('give names of results, --minutes or --list')
        names = choose(args.names, results, claims)
        if args.minutes:
            names = list(fitting(args.minutes, names, results))
        if args.list:
            return print_list(names, results, claims)
        out = (args.out or Path(tempfile.mkdtemp(prefix='reproduce-'))).resolve()
        differ = 0
        for name in progress.track(names):
            progress.print(name)
            differ += reproduce(name, results[name], claims, out)
    print(f'{differ} numbers differ; the new results are in {out}')
    if differ:
        raise SystemExit(1)


if __name__ == '__main__':
    main()
