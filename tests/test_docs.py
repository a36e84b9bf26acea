"""The docs: their code runs, their commands exist, their links lead somewhere."""

import ast
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import Registry

from mmdynsparse import registry
from mmdynsparse.models import SparseSwinTransformer

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / 'docs').glob('*.md'))
TEXTS = [*PAGES, *(ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'))]
TEXTS += [*sorted(ROOT.glob('configs/*/README.md')), ROOT / 'benchmarks' / 'README.md']
FENCE = re.compile(r'^```(\w+)\n(.*?)^```', re.M | re.S)
# What a block needs that a reader has and a test has not: files, or a GPU's settings.
NEEDS_FILES = ('cv2.imread', 'torch.load', 'deterministic', '_base_')


def name(path: Path) -> str:
    """Return a path in the repository as the name of a test."""
    return str(path.relative_to(ROOT))


def blocks(language: str) -> list[tuple[str, str]]:
    """Return page and text of the fenced blocks in a language."""
    return [
        (name(p), text)
        for p in PAGES
        for kind, text in FENCE.findall(p.read_text())
        if kind in ([language] if language == 'python' else ['bash', 'shell'])
    ]


def slug(heading: str) -> str:
    """Return the anchor that GitHub and MyST give a heading."""
    text = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading).strip().lower()
    return re.sub(r'[^\w\- ]', '', text).replace(' ', '-')


@pytest.mark.parametrize(('page', 'text'), blocks('python'))
def test_python_blocks(page, text):
    """They parse; what needs no file runs, and every type of ours in them exists."""
    try:
        ast.parse(text)
    except SyntaxError:
        # A part of a call's arguments.
        ast.parse(f'f(\n{text}\n)')
    for kind in re.findall(r"type='mmdynsparse\.(\w+)'", text):
        registries = [item for item in vars(registry).values() if isinstance(item, Registry)]
        for item in registries:
            item.import_from_location()
        assert any(kind in item.module_dict for item in registries), kind
    if any(word in text for word in NEEDS_FILES) or text.startswith((' ', 'dict(', 'decode_head')):
        return
    if text.startswith(('neck=', 'pruning=')):
        return
    torch.manual_seed(0)
    backbone = SparseSwinTransformer(embed_dims=12, sparsity=dict(keep_ratio=0.7)).eval()
    space = dict(backbone=backbone, images=torch.rand(1, 3, 64, 64))
    exec(compile(text, page, 'exec'), space)
    if 'shares' in space:
        assert space['shares'] == pytest.approx([0.69, 0.5, 0.30], abs=0.02)


def commands() -> list[tuple[str, list[str]]]:
    """Return page and words of each call of one of our tools in a fenced block."""
    found = []
    for page, text in blocks('bash'):
        for line in text.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ['python'] and words[1:2] and words[1].startswith('tools/'):
                found.append((page, words[1:]))
    return found


@pytest.mark.parametrize(('page', 'words'), commands())
def test_commands(page, words, monkeypatch):
    """The tool exists and takes these arguments."""
    tool = ROOT / words[0]
    monkeypatch.setattr(sys, 'argv', [str(tool)])
    spec = importlib.util.spec_from_file_location(f'documented_{tool.stem}', tool)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = [word.strip('[]') for word in words[1:]]
    options = [word for word in arguments if word.startswith('--')]
    if not hasattr(module, 'build_parser'):
        own = tool.read_text()
        # --out is one of AnalysisParser's.
        assert all(f"'{option}'" in own for option in options if option != '--out')
        return
    known = {text for action in module.build_parser()._actions for text in action.option_strings}
    assert set(options) <= known
    configs = [word for word in arguments if word.startswith('configs/') and '*' not in word]
    for config in configs:
        assert Config.fromfile(ROOT / config).model


@pytest.mark.parametrize('path', TEXTS, ids=name)
def test_links(path):
    """Relative links name a file, and a heading if they have an anchor."""
    text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.M | re.S)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if '://' in target:
            continue
        file, _, anchor = target.partition('#')
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if anchor:
            # A folder shows its README.
            linked = linked / 'README.md' if linked.is_dir() else linked
            headings = re.findall(r'^#+ (.+)$', linked.read_text(), re.M)
            assert anchor in {slug(heading) for heading in headings}, target


def test_every_page_is_in_the_site():
    """The toctrees of the first page name each page."""
    listed = set((ROOT / 'docs' / 'index.md').read_text().split())
    assert {page.stem for page in PAGES} - {'index'} <= listed


def test_length():
    """What nobody reads is not documentation: README and docs stay short."""
    assert len((ROOT / 'README.md').read_text().split()) <= 900
    assert sum(len(page.read_text().split()) for page in PAGES) <= 10_000
