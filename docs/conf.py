"""Sphinx configuration: ``make docs`` builds the site into docs/_build/html."""

import os
import re
import sys

sys.path.insert(0, os.path.abspath('..'))

from mmdynsparse import registry
from mmdynsparse.version import __version__

project = 'mmdynsparse'
author = 'mmdynsparse contributors'
release = __version__
extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.githubpages',
]
exclude_patterns = ['_build']

html_theme = 'furo'
html_title = f'mmdynsparse {release}'

# Links to a heading are checked by MyST: a wrong one is a warning, and warnings are errors.
myst_heading_anchors = 3
myst_enable_extensions = ['colon_fence']
# Links that leave docs/ lead to the files of the repository, which pages on GitHub show.
linkcheck_ignore = [r'https?://.*']

autodoc_class_signature = 'mixed'
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
autodoc_default_options = {'members': False, 'show-inheritance': False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

# Registers every part, so that the reference lists heads and necks of installed libraries.
registry.MODELS.import_from_location()


def setup(app):
    """Name files of the repository outside of docs/, which the site has not, by their path."""
    app.connect('source-read', _outside_links)


def _outside_links(app, page, source):
    source[0] = re.sub(r'(?<!!)\[([^]]+)\]\(\.\./([^)#]+)(#[^)]*)?\)', r'\1 (`\2`)', source[0])
