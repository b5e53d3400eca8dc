"""The size and the shape of train_gpt.py: ceilings that only ever go down, and what a reader may rely on.

python tests/test_style.py [FILE]      the numbers of a script
"""

import ast
import functools
import re
import subprocess
import symtable
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
LINES, BRANCHES, SETTINGS = 3724, 73, 109  # documents raised them; in all; of branches: for 1,000 lines
FUNCTION, TRAIN, CLASS = 80, 120, 150  # lines of a function, of the visible loop, of a class
COLUMNS, BYTES = 110, 54.8  # of a line, the longest and the mean of all, blank ones included
NEEDED, PARAMETERS = 7, 10  # parameters of a function without a default, and in all; self is not counted

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Script:
    """A source file and its syntax tree."""

    def __init__(self, path):
        self.name, self.bytes = path.name, path.read_bytes()
        self.text = self.bytes.decode()
        self.lines, self.tree = self.text.splitlines(), ast.parse(self.text)
        self.nodes = list(ast.walk(self.tree))
        self.methods = {
            id(f) for node in self.all(ast.ClassDef) for f in node.body if isinstance(f, FUNCTIONS)
        }

    def all(self, *kinds):
        return [node for node in self.nodes if isinstance(node, kinds)]

    def at(self, node, fault):
        """A line of a failure's list."""
        return f"{self.name}:{node.lineno} {getattr(node, 'name', '')} {fault}"

    def branches(self):
        """If statements, elif included, and conditional expressions."""
        return len(self.all(ast.If, ast.IfExp))

    def settings(self):
        """The fields of Hyperparameters."""
        (found,) = (node for node in self.all(ast.ClassDef) if node.name == "Hyperparameters")
        return [node.target.id for node in found.body if isinstance(node, ast.AnnAssign)]

    def length(self, node):
        return node.end_lineno - node.lineno + 1

    def parameters(self, function):
        """How many a call must give, and may give."""
        a = function.args
        static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
        own = id(function) in self.methods and not static
        given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        defaults = len(a.defaults) + sum(default is not None for default in a.kw_defaults)
        optional = defaults + sum(each is not None for each in (a.vararg, a.kwarg))
        return len(given) - own - optional, len(given) - own


script = Script(SCRIPT)


# ----------------------------------------------------------------------------------------------------------
# Ceilings
# ----------------------------------------------------------------------------------------------------------


def test_lines_branches_and_settings_of_the_file():
    lines, branches, settings = len(script.lines), script.branches(), len(script.settings())
    dense = round(1000 * branches / lines, 1)
    found = {
        "lines": (lines, LINES),
        "branches for 1,000 lines": (dense, BRANCHES),
        "settings": (settings, SETTINGS),
    }
    over = [f"{have} {what}, {most} at most" for what, (have, most) in found.items() if have > most]
    assert not over, f"{script.name}: {'; '.join(over)}; what does the new make superfluous?"


def test_columns_and_bytes_of_lines():
    """Fewer lines are not to be had by denser ones."""
    long = [
        f"{script.name}:{i} has {len(s)} columns" for i, s in enumerate(script.lines, 1) if len(s) > COLUMNS
    ]
    assert not long, f"{COLUMNS} at most"
    mean = len(script.bytes) / len(script.lines)
    assert mean <= BYTES, f"{mean:.2f} bytes for a line, {BYTES} at most"


def test_lengths_of_functions_and_classes():
    most = {
        id(f): TRAIN if f.name == "train" and id(f) not in script.methods else FUNCTION
        for f in script.all(*FUNCTIONS)
    }
    most |= {id(node): CLASS for node in script.all(ast.ClassDef)}
    long = [
        script.at(node, f"has {script.length(node)} lines, {most[id(node)]} at most")
        for node in script.all(*FUNCTIONS, ast.ClassDef)
        if script.length(node) > most[id(node)]
    ]
    assert not long


def test_parameters_of_functions():
    many = []
    for function in script.all(*FUNCTIONS):
        needed, in_all = script.parameters(function)
        if needed > NEEDED or in_all > PARAMETERS:
            many.append(script.at(function, f"needs {needed} parameters, takes {in_all}"))
    assert not many, f"{NEEDED} without a default and {PARAMETERS} in all at most"


# ----------------------------------------------------------------------------------------------------------
# Shape
# ----------------------------------------------------------------------------------------------------------


def test_sections_stand_in_the_order_of_the_contents():
    """Each opens with a dashed rule, its number and title, and two to six lines of prose."""
    found = [
        (int(rule[1]), rule[2], len(rule[3].splitlines()), script.text[: rule.start()].count("\n") + 1)
        for rule in re.finditer(r"^# -{40,}\n# (\d+) (.+)\n((?:# .*\n)+)", script.text, re.MULTILINE)
    ]
    contents = re.findall(r"(\d+) ([A-Z][\w -]*?)(?=  |$)", ast.get_docstring(script.tree), re.MULTILINE)
    assert [(number, title) for number, title, *_ in found] == [(int(n), title) for n, title in contents]
    assert [number for number, *_ in found] == list(range(1, 15))
    prose = [
        f"{script.name}:{line} {title} opens with {n} lines" for _, title, n, line in found if not 2 <= n <= 6
    ]
    assert not prose
    rules = [line for line in script.lines if re.match(r"# -{40,}$", line)]
    assert len(rules) == len(found) and len(set(rules)) == 1


def test_everything_public_has_a_docstring():
    public = [node for node in script.tree.body if isinstance(node, (*FUNCTIONS, ast.ClassDef))]
    bare = [
        script.at(n, "has no docstring")
        for n in public
        if not n.name.startswith("_") and not ast.get_docstring(n)
    ]
    assert not bare and ast.get_docstring(script.tree)


@functools.cache
def names_used(statement):
    """The module's names that a top-level statement looks up, at once or when called; not in annotations."""
    copy = ast.parse(ast.unparse(statement))
    for node in ast.walk(copy):
        if isinstance(node, FUNCTIONS):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    tables, used = [symtable.symtable(ast.unparse(copy), "", "exec")], set()
    while tables:
        table = tables.pop()
        tables += table.get_children()
        top = table.get_type() == "module"
        used |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return used


def names_defined(statement):
    if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
        return {statement.name}
    targets = (
        statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", statement)]
    )
    return {
        n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }


def test_everything_is_defined_before_it_is_used():
    """Parts above, the processes that use them below; a function may call itself."""
    place = {name: at for at, node in enumerate(script.tree.body) for name in names_defined(node)}
    early = [
        script.at(
            node, f"uses {name}, which is defined below, in line {script.tree.body[place[name]].lineno}"
        )
        for at, node in enumerate(script.tree.body)
        for name in sorted(names_used(node))
        if place.get(name, -1) > at
    ]
    assert not early


def test_everything_is_used():
    """Functions, classes and constants by the script, types by an annotation, and every setting."""
    places = [(node, names_used(node)) for node in script.tree.body]
    for node in script.nodes:
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            places += [
                (None, {n.id}) for n in ast.walk(annotation or node) if annotation and isinstance(n, ast.Name)
            ]
    idle = [
        script.at(node, f"{name} is used nowhere")
        for node in script.tree.body
        for name in names_defined(node) - {"main"}
        if not any(name in used for place, used in places if place is not node)
    ]
    assert not idle
    read = {node.attr for node in script.all(ast.Attribute) if isinstance(node.ctx, ast.Load)}
    (roles,) = (node for node in script.tree.body if "ROLES" in names_defined(node))  # names of settings
    read |= {node.value for node in ast.walk(roles) if isinstance(node, ast.Constant)}
    unread = [name for name in script.settings() if name not in read]
    assert not unread, "settings that nothing reads"


def test_what_is_not_wanted():
    """`global`, settings with a default of their own, handlers that take everything."""
    found = [script.at(node, "declares a global") for node in script.all(ast.Global)]
    found += [
        script.at(node, "is a bare except") for node in script.all(ast.ExceptHandler) if node.type is None
    ]
    found += [
        script.at(node, "reads a setting with a default: " + ast.unparse(node))
        for node in script.all(ast.Call)
        if ast.unparse(node.func) == "getattr"
        and len(node.args) == 3
        and ast.unparse(node.args[0]).endswith("hp")
    ]
    assert not found


def test_the_module_only_defines():
    """Imports, functions, classes and tables; what runs stands under the last line's condition."""
    first, *middle, last = script.tree.body
    assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    imports, defines = (ast.Import, ast.ImportFrom), (*FUNCTIONS, ast.ClassDef, ast.Assign, ast.AnnAssign)
    runs = [
        node for node in middle if isinstance(node, ast.If) and ast.dump(node.test) == ast.dump(last.test)
    ]
    assert len(runs) == 1 and "GOMP_SPINCOUNT" in ast.unparse(runs[0])  # which torch reads when it is loaded
    others = [node for node in middle if node not in runs and not isinstance(node, (*imports, *defines))]
    libraries = [
        node
        for node in others
        if isinstance(node, ast.Try) and all(isinstance(n, imports) for n in node.body)
    ]
    found = [script.at(node, ast.unparse(node)) for node in others if node not in libraries]
    assert not found and len(libraries) == 1


# ----------------------------------------------------------------------------------------------------------
# By other programs
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.whole
def test_importing_the_script_has_no_side_effects(tmp_path):
    """No print, no file, no CUDA, no setting of torch, and no look at the environment, here nonsense."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch; before = torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype()\n"
        "import train_gpt\n"
        "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()\n"
        "assert before == (torch.get_num_threads(), torch.initial_seed(), torch.get_default_dtype())\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    env = {"PRESET": "nonsense", "SEED": "x", "ITERATIONS": "-1", "WORLD_SIZE": "many", "DEVICE": "cuda"}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.whole
def test_tests_have_the_layout_of_ruff():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "tests"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def numbers(path):
    """A script's size as a table: lines, branches, settings, functions."""
    measured = Script(path)
    functions, lines = measured.all(*FUNCTIONS), len(measured.lines)
    longest, widest = (
        max(functions, key=measured.length),
        max(functions, key=lambda f: measured.parameters(f)[1]),
    )
    return {
        "lines": lines,
        "branches": measured.branches(),
        "branches for 1,000 lines": round(1000 * measured.branches() / lines, 1),
        "settings": len(measured.settings()),
        "bytes for a line": round(len(measured.bytes) / lines, 2),
        "longest line": max(map(len, measured.lines)),
        "functions": len(functions),
        "longest function": f"{longest.name}, {measured.length(longest)} lines",
        "longest class": max((measured.length(n), n.name) for n in measured.all(ast.ClassDef)),
        "most parameters": f"{widest.name}, {measured.parameters(widest)[1]}",
        "most without a default": max(measured.parameters(f)[0] for f in functions),
    }


if __name__ == "__main__":
    for key, value in numbers(Path(sys.argv[1]) if len(sys.argv) > 1 else SCRIPT).items():
        print(f"{key:26}{value}")
