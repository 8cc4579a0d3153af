"""What the site takes besides pages: the README, and docstrings as Markdown."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROLE = re.compile(r':(?:class|func|meth|mod):`([\w.]+)`')


def on_files(files: Files, config: Any) -> Files:
    """Make the README the first page."""
    text = Path(config.config_file_path).with_name('README.md').read_text()
    files.append(
        File.generated(config, 'index.md', content=text.replace('(docs/', '('))
    )
    return files


class SphinxRoles(griffe.Extension):
    """Turns :func:`name` of docstrings into links, and the :: before code into one."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            text = ROLE.sub(r'[`\1`][\1]', obj.docstring.value)
            obj.docstring.value = re.sub(r'::$', ':', text, flags=re.MULTILINE)
