"""Imports are followed as Python would follow them, inside the project and no further."""

import pytest
from support import imports

FILES = {
    "one/helper.py": "import torch, json\nfrom folder import part\n",
    "one/folder/part.py": "from .. import nothing\nfrom . import beside\nimport helper\n",
    "one/folder/beside.py": "class A:\n    def f(self):\n        import far.away.deep as d\n",
    "one/unused.py": "",
    "two/helper.py": "import unused\n",
    "two/far/__init__.py": "",
    "two/far/away/deep.py": "x = 1\n",
    "two/far/other.py": "",
}


@pytest.fixture
def roots(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return [tmp_path / "one", tmp_path / "two"]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (["import torch"], []),
        (["x = ("], []),
        (["import far"], ["two/far/__init__.py"]),
        (["from far import other, missing"], ["two/far/__init__.py", "two/far/other.py"]),
        (["from far.away import deep"], ["two/far/__init__.py", "two/far/away/deep.py"]),
        (
            ["x = (", "def f():\n    import helper"],
            [
                "one/folder/beside.py", "one/folder/part.py", "one/helper.py",
                "two/far/__init__.py", "two/far/away/deep.py",
            ],
        ),
    ],
)  # fmt: skip
def test_files_that_code_imports(tmp_path, roots, code, found):
    files = imports.followed(code, roots)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == found
