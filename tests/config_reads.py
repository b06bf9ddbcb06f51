"""Which fields of an experiment's config a module reads, from its source alone."""

import ast
from collections.abc import Iterable

Path = tuple[str, ...]  # () is the config itself, ("data",) a section, ("data", "resize") a field


class FieldReads:
  """Fields of the config that a module reads, by name of section and field.

  Follows attributes, literal keys and keys from a literal tuple, local names of the config or a section, and a
  section that is handed to a function of this or another module.
  """

  def __init__(self, module: str, text: str):
    self._module = module
    self._tree = ast.parse(text)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    members = [x for node in self._tree.body for x in (node.body if isinstance(node, ast.ClassDef) else [node])]
    self._scopes = [node for node in members if isinstance(node, functions)]

  def handed(self) -> dict[tuple[str, str, int | str], Path]:
    """Sections given to functions: (module, function, position or keyword) -> section."""
    found: dict[tuple[str, str, int | str], Path] = {}
    for scope in self._scopes:
      names = self._names(scope, {})
      for node in (node for node in ast.walk(scope) if isinstance(node, ast.Call)):
        module, _, function = f"{self._module}.{ast.unparse(node.func)}".split("(")[0].rpartition(".")
        given: dict[int | str, ast.expr] = dict(enumerate(node.args))
        given |= {keyword.arg or "": keyword.value for keyword in node.keywords}
        for place, value in given.items():
          if len(path := self._path(value, names) or ()) == 1:
            found[module.split(".")[-1], function, place] = path
    return found

  def fields(self, handed: dict[tuple[str, str, int | str], Path]) -> set[str]:
    """Dotted names of what is read."""
    found: set[str] = set()
    for scope in self._scopes:
      arguments = [argument.arg for argument in (*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs)]
      given: dict[str, Path | None] = {
        name: path
        for place, name in enumerate(arguments)
        for key in (place, name)
        if (path := handed.get((self._module, scope.name, key)))
      }
      names = self._names(scope, given)
      for node in ast.walk(scope):
        if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Load):
          found |= {".".join(path) for path in self._paths(scope, node, names)}
    return found

  def _names(self, scope: ast.AST, names: dict[str, Path | None]) -> dict[str, Path | None]:
    """Local names of the config and its sections."""
    names = dict(names)
    assignments = [node for node in ast.walk(scope) if isinstance(node, ast.Assign)]
    for node in sorted(assignments, key=lambda node: node.lineno):
      pairs = [(node.targets[0], node.value)]
      if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
        pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
      names |= {target.id: self._path(value, names) for target, value in pairs if isinstance(target, ast.Name)}
    return names

  def _path(self, node: ast.AST, names: dict[str, Path | None]) -> Path | None:
    """Where an expression lies in the config; None outside of it."""
    if isinstance(node, ast.Name):
      return names.get(node.id, () if node.id == "config" else None)
    if not isinstance(node, ast.Attribute | ast.Subscript):
      return None
    base = self._path(node.value, names)
    if isinstance(node, ast.Attribute):
      return (*base, node.attr) if base is not None else () if node.attr in ("config", "_config") else None
    if base is None or not isinstance(node.slice, ast.Constant):
      return None
    return (*base, str(node.slice.value))

  def _paths(self, scope: ast.AST, node: ast.Attribute | ast.Subscript, names: dict[str, Path | None]) -> set[Path]:
    """`_path`, or several where a key runs through a literal tuple."""
    base = self._path(node.value, names)
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name) and base is not None:
      return {(*base, key) for key in self._keys(scope, node.slice.id)}
    path = self._path(node, names)
    return {path} if path else set()

  def _keys(self, scope: ast.AST, name: str) -> set[str]:
    """Strings that a loop over a literal tuple, or over a local name of one, gives a name."""
    nodes = list(ast.walk(scope))
    tuples = {
      x.targets[0].id: x.value for x in nodes if isinstance(x, ast.Assign) and isinstance(x.targets[0], ast.Name)
    }
    keys: set[str] = set()
    for loop in (node for node in nodes if isinstance(node, ast.For | ast.comprehension)):
      if isinstance(loop.target, ast.Name) and loop.target.id == name:
        over = tuples.get(loop.iter.id) if isinstance(loop.iter, ast.Name) else loop.iter
        elements = over.elts if isinstance(over, ast.Tuple | ast.List) else []
        keys |= {str(x.value) for x in elements if isinstance(x, ast.Constant)}
    return keys


def fields_read(modules: Iterable[tuple[str, str]]) -> set[str]:
  """Dotted names of the config's fields that some modules, (name, text), read."""
  readers = [FieldReads(name, text) for name, text in modules]
  handed = {key: path for reader in readers for key, path in reader.handed().items()}
  return {field for reader in readers for field in reader.fields(handed)}
