"""What the site takes besides pages: the README, and docstrings as Markdown."""

import json
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROLE = re.compile(r':(?:class|func|meth|mod):`([\w.]+)`')


def on_files(files: Files, config: Any) -> Files:
    """Make the README the first page, and the notebook one."""
    readme = Path(config.config_file_path).with_name('README.md').read_text()
    notebook = Path(config.docs_dir, 'tutorial.ipynb').read_text()
    pages = {
        'index.md': readme.replace('(docs/', '(').replace('.ipynb)', '.md)'),
        'tutorial.md': as_markdown(json.loads(notebook)),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def as_markdown(notebook: dict) -> str:
    """The cells of a notebook, with the text and the pictures that they print."""
    parts = []
    for cell in notebook['cells']:
        source = ''.join(cell['source'])
        parts.append(
            f'```python\n{source}\n```' if cell['cell_type'] == 'code' else source
        )
        for output in cell.get('outputs', ()):
            data = output.get('data', {'text/plain': output.get('text', '')})
            if pictures := [kind for kind in data if kind.startswith('image/')]:
                content = ''.join(data[pictures[0]]).replace('\n', '')
                parts.append(f'![](data:{pictures[0]};base64,{content})')
            else:
                parts.append(f'```text\n{"".join(data["text/plain"]).rstrip()}\n```')
    text = '\n\n'.join(parts) + '\n'
    return text.replace('](../README.md)', '](index.md)')


class SphinxRoles(griffe.Extension):
    """Turns :func:`name` of docstrings into links, and the :: before code into one."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            text = ROLE.sub(r'[`\1`][\1]', obj.docstring.value)
            obj.docstring.value = re.sub(r'::$', ':', text, flags=re.MULTILINE)
