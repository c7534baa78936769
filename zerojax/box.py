"""A parameter that is gathered where the model reads it, and stands in for the array until then."""

import operator

import jax
import jax.numpy as jnp

from zerojax.errors import LayoutError

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")
_UNARY = ("neg", "pos", "abs")


@jax.tree_util.register_pytree_with_keys_class
class Box:
    """Behaves as the whole array in jnp functions, operators, indexing and attributes; each use is a read.

    A pytree of the arrays it holds, so it goes through scan, vmap, remat and jit; a scan's slices are boxes again.
    `jax.lax` functions take arrays only: give them `zj.whole(box)`.

    Attributes:
      value: the parameter at rest.
      gathered: it, whole and in the compute dtype, where that was done before; else None.
      reader: `Gather` (or the census's stand-in), for `value`'s dimensions before any slicing.
      path: for messages.
      often: each use of it is a read, also where a module asks for it once (see `census`).
    """

    __slots__ = ("gathered", "often", "path", "reader", "value")
    __array_ufunc__ = None  # numpy arrays leave operators to us
    __hash__ = None  # pyright: ignore[reportAssignmentType]  as arrays

    def __init__(self, value, gathered, reader, path, often=False):
        self.value, self.gathered, self.reader, self.path, self.often = value, gathered, reader, path, often

    def tree_flatten_with_keys(self):
        names = ("value", "gathered")
        return tuple((jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in names), (self.reader, self.path, self.often)

    def tree_flatten(self):
        return (self.value, self.gathered), (self.reader, self.path, self.often)

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children, *aux)

    def sliced(self, index: int) -> "Box":
        """What a loop over dimension `index` sees of it. Raises `LayoutError` if that is the sharded one."""
        reader, index = self.reader, index % self.reader.ndim
        if reader.spec[index] != reader.whole[index]:
            raise LayoutError(
                f"{self.path}: a scan or vmap slices its dimension {index}, over which it is sharded ({reader.spec}), so that "
                f"every slice would lie on one device. Zero(rules={{{self.path!r}: P({'None, ' * (index + 1)}'data')}}) shards the "
                f"next dimension if it divides; {{{self.path!r}: P()}} leaves it whole.")
        return type(self)(self.value, self.gathered, reader.drop(index), self.path, self.often)

    def read(self) -> jax.Array:
        """The whole array, in the compute dtype."""
        box = self
        while box.reader.ndim > jnp.ndim(box.value):  # a scan sliced it and did not say so: along the first dimension
            box = box.sliced(0)
        return box.reader(box.value, box.gathered)

    def once(self) -> "Box | jax.Array":
        """What a module that asks for its parameter is given: the array, or where each use reads, a gathered box."""
        if not self.often:
            return self.read()
        gathered = self.reader.top(self.value) if self.gathered is None else self.gathered
        return Box(self.value, gathered, self.reader, self.path, True)

    def __jax_array__(self):
        return self.read()

    @property
    def shape(self):
        return self.value.shape

    @property
    def ndim(self):
        return self.value.ndim

    @property
    def size(self):
        return self.value.size

    @property
    def dtype(self):
        return jnp.dtype(self.reader.compute)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.read(), name)

    def __getitem__(self, index):
        return self.read()[index]

    def __len__(self):
        return len(self.value)

    def __iter__(self):
        return iter(self.read())

    def __round__(self, digits=None):
        return round(self.read(), digits)

    def __divmod__(self, other):
        return divmod(self.read(), array(other))

    def __rdivmod__(self, other):
        return divmod(array(other), self.read())

    def __repr__(self):
        return f"Box({self.path}, {self.value!r})"


def _operators(name):
    op = getattr(operator, name)
    setattr(Box, f"__{name}__", lambda self, other: op(self.read(), array(other)))
    if name in _BINARY:
        setattr(Box, f"__r{name}__", lambda self, other: op(array(other), self.read()))


def _unary(name):
    op = getattr(operator, name)
    setattr(Box, f"__{name}__", lambda self: op(self.read()))


for _name in _BINARY + _COMPARE:
    _operators(_name)
for _name in _UNARY:
    _unary(_name)


def array(x):
    """`x`, read if it is a box."""
    return x.read() if isinstance(x, Box) else x


def whole(tree):
    """`tree` with every parameter whole, as plain arrays in the compute dtype: for `jax.lax` functions, which take no boxes.

    Outside a loss function, and for arrays, it changes nothing.

    >>> whole({"w": 1.0})
    {'w': 1.0}
    """
    return jax.tree.map(array, tree, is_leaf=lambda x: isinstance(x, Box))
