"""Vectors of sixteen float32 in Numba kernels, and access to memory.

LLVM may or may not turn a loop into vector instructions; an expression of :data:`LANES`, such as ``leak * v +
x``, is vector instructions by construction (several shorter ones if the processor's are shorter). No
operation is reordered or fused, so each lane has the bits of the scalar expression.

Memory is accessed through pointers, not arrays: counting references to arrays would wait for streamed stores.
The pointer's type says how a lane is stored: :data:`FLOATS`, :data:`BYTES` (0 to 255), :data:`HALVES`
(float16) or :data:`BFLOATS` (bfloat16, which Numba does not have).
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typeconv import Conversion
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_cast, models, register_model

inlined = njit(forceinline=True, error_model="numpy")  # of functions that kernels call

WIDTH = 16  # lanes: a cache line of float32
LINE = 64  # bytes of a cache line

FLOATS, BYTES = types.CPointer(types.float32), types.CPointer(types.uint8)
HALVES, BFLOATS = types.CPointer(types.int16), types.CPointer(types.uint16)
INTS, BITS = types.CPointer(types.int64), types.CPointer(types.int16)
SHORT_INTS = types.CPointer(types.int32)
KINDS = (FLOATS, HALVES, BFLOATS)  # how x, spikes and their gradients may be stored

_BIT, _I8, _I16, _I32, _I64 = map(ir.IntType, (1, 8, 16, 32, 64))
_F32 = ir.FloatType()
_FLOAT_LANES = ir.VectorType(_F32, WIDTH)
_features = llvmlite.binding.get_host_cpu_features()
# Without these instructions LLVM would call a conversion function that does not exist.
HAS_HALVES = _features.get("f16c", not llvmlite.binding.get_process_triple().startswith("x86"))


class Lanes(types.Type):
    """Numba's type of :data:`WIDTH` numbers (``of="float"``) or conditions (``of="bit"``)."""

    def __init__(self, of: str) -> None:
        self.of = of
        super().__init__(f"Lanes({of})")

    def can_convert_from(self, typing, other):
        """Let a float32 in an expression stand for sixteen copies of it."""
        return Conversion.safe if self.of == "float" and other == types.float32 else None


LANES, CONDITIONS = Lanes("float"), Lanes("bit")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(_F32 if kind.of == "float" else _BIT, WIDTH))


@lower_cast(types.float32, Lanes)
def _broadcast(context, builder, source, target, value):
    undefined = ir.Constant(_FLOAT_LANES, ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, WIDTH), [0] * WIDTH))


def _define(function: Callable, result: Lanes, arguments: int, build: Callable) -> None:
    """Overload ``function`` for lanes; ``build(builder, *lanes)`` emits its instructions."""

    class Template(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == arguments and LANES in args and all(a in (LANES, types.float32) for a in args):
                return signature(result, *[LANES] * arguments)
            return None

    Template.key = function
    infer_global(function)(Template)
    lower_builtin(function, *[LANES] * arguments)(lambda context, builder, _, given: build(builder, *given))


_define(operator.add, LANES, 2, lambda builder, a, b: builder.fadd(a, b))
_define(operator.sub, LANES, 2, lambda builder, a, b: builder.fsub(a, b))
_define(operator.mul, LANES, 2, lambda builder, a, b: builder.fmul(a, b))
_define(operator.truediv, LANES, 2, lambda builder, a, b: builder.fdiv(a, b))
_define(operator.gt, CONDITIONS, 2, lambda builder, a, b: builder.fcmp_ordered(">", a, b))
_define(operator.ge, CONDITIONS, 2, lambda builder, a, b: builder.fcmp_ordered(">=", a, b))
_define(operator.ne, CONDITIONS, 2, lambda builder, a, b: builder.fcmp_unordered("!=", a, b))
_define(abs, LANES, 1, lambda builder, a: _call(builder, "llvm.fabs.v16f32", a))


def _call(builder, name, argument):
    kind = ir.FunctionType(_FLOAT_LANES, [_FLOAT_LANES])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [argument])


@intrinsic
def root(typing, a):
    """Return the square root of each lane."""
    return LANES(LANES), lambda context, builder, _, given: _call(builder, "llvm.sqrt.v16f32", *given)


@intrinsic
def select(typing, condition, a, b):
    """Return ``a`` where the condition holds, else ``b``."""
    return LANES(CONDITIONS, LANES, LANES), lambda context, builder, _, given: builder.select(*given)


@intrinsic
def spread(typing, value):
    """Return sixteen copies of a number."""

    def build(context, builder, _, given):
        return _broadcast(context, builder, types.float32, LANES, given[0])

    return LANES(types.float32), build


@intrinsic
def fused(typing, a, b, c):
    """Return ``a * b + c``, rounded once."""

    def build(context, builder, _, given):
        kind = ir.FunctionType(_FLOAT_LANES, [_FLOAT_LANES] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.v16f32"), given)

    return LANES(LANES, LANES, LANES), build


@intrinsic
def mask_of(typing, conditions):
    """Return sixteen conditions as the bits of a number."""

    def build(context, builder, _, given):
        return builder.zext(builder.bitcast(given[0], _I16), _I64)

    return types.int64(CONDITIONS), build


@intrinsic
def ones(typing, mask):
    """Return how many bits of a number are set."""
    return types.int64(types.int64), lambda context, builder, _, given: builder.ctpop(given[0])


@intrinsic
def lowest(typing, mask):
    """Return the place of the lowest bit of a number that is not 0."""
    return types.int64(types.int64), lambda context, builder, _, given: builder.cttz(given[0], _BIT(1))


# ------------------------------------------------------------------------------------------ memory


@intrinsic
def at(typing, pointer, index):
    """Return the pointer to ``pointer[index]``."""
    return pointer(pointer, types.int64), lambda context, builder, _, given: builder.gep(given[0], [given[1]])


def _pointer_to(kind: types.CPointer) -> Callable:
    @intrinsic
    def pointer(typing, address):
        def build(context, builder, _, given):
            return builder.inttoptr(given[0], context.get_value_type(kind))

        return kind(types.int64), build

    return pointer


# from an address
floats, bytes_, ints, short_ints, bits = map(_pointer_to, (FLOATS, BYTES, INTS, SHORT_INTS, BITS))


@intrinsic(prefer_literal=True)
def sequence(typing, address, kind):
    """Return the pointer to numbers of ``KINDS[kind]``, a constant, at an address."""
    pointer = KINDS[kind.literal_value]

    def build(context, builder, _, given):
        return builder.inttoptr(given[0], context.get_value_type(pointer))

    return pointer(types.int64, kind), build


@intrinsic
def address(typing, pointer):
    """Return the pointer as a number, 0 for a null pointer."""
    return types.int64(pointer), lambda context, builder, _, given: builder.ptrtoint(given[0], _I64)


def _vector(element) -> ir.VectorType:
    return ir.VectorType(element, WIDTH)


def _read(builder, pointer, element):
    return builder.load(builder.bitcast(pointer, _vector(element).as_pointer()), align=element.width // 8)


@intrinsic
def load(typing, pointer):
    """Load sixteen numbers that are stored in any of the four ways."""

    def build(context, builder, _, given):
        if pointer == FLOATS:
            return builder.load(builder.bitcast(given[0], _FLOAT_LANES.as_pointer()), align=4)
        if pointer == BYTES:
            return builder.uitofp(_read(builder, given[0], _I8), _FLOAT_LANES)
        bits = _read(builder, given[0], _I16)
        if pointer == HALVES:
            return builder.fpext(builder.bitcast(bits, _vector(ir.HalfType())), _FLOAT_LANES)
        high = builder.shl(builder.zext(bits, _vector(_I32)), _vector(_I32)([16] * WIDTH))
        return builder.bitcast(high, _FLOAT_LANES)

    return LANES(pointer), build


@intrinsic
def load_bits(typing, pointer):
    """Load sixteen conditions, a bit each."""

    def build(context, builder, _, given):
        return builder.bitcast(builder.load(given[0], align=2), _vector(_BIT))

    return CONDITIONS(BITS), build


@intrinsic
def store_bits(typing, pointer, conditions):
    """Store sixteen conditions, a bit each."""

    def build(context, builder, _, given):
        builder.store(builder.bitcast(given[1], _I16), given[0], align=2)
        return context.get_dummy_value()

    return types.void(BITS, CONDITIONS), build


def _as_stored(builder, pointer, lanes):
    """Convert lanes to the type that :func:`store` writes."""
    if pointer == FLOATS:
        return lanes
    if pointer == BYTES:
        return builder.trunc(builder.fptosi(lanes, _vector(_I32)), _vector(_I8))
    if pointer == HALVES:
        return builder.fptrunc(lanes, _vector(ir.HalfType()))
    # round to the nearest bfloat16, ties to even; a NaN keeps its upper bits, one of which is set
    ones, half = (_vector(_I32)([number] * WIDTH) for number in (1, 0x7FFF))
    sixteen, quiet = (_vector(_I32)([number] * WIDTH) for number in (16, 0x400000))
    bits = builder.bitcast(lanes, _vector(_I32))
    odd = builder.and_(builder.lshr(bits, sixteen), ones)
    rounded = builder.add(bits, builder.add(odd, half))
    is_nan = builder.fcmp_unordered("uno", lanes, lanes)
    kept = builder.select(is_nan, builder.or_(bits, quiet), rounded)
    return builder.trunc(builder.lshr(kept, sixteen), _vector(_I16))


def _storing(streamed: bool) -> Callable:
    def store(typing, pointer, lanes):
        def build(context, builder, _, given):
            value = _as_stored(builder, pointer, given[1])
            bytes_each = {FLOATS: 4, BYTES: 1}.get(pointer, 2)
            target = builder.bitcast(given[0], value.type.as_pointer())
            done = builder.store(value, target, align=bytes_each * (WIDTH if streamed else 1))
            if streamed:
                done.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
            return context.get_dummy_value()

        return types.void(pointer, LANES), build

    store.__doc__ = (
        """Store sixteen numbers past the cache, at an address that is a multiple of their size."""
        if streamed
        else """Store sixteen numbers as the pointer's type says; bytes are truncated."""
    )
    return intrinsic(store)


store, stream = _storing(False), _storing(True)


@intrinsic
def looked_up(typing, table, pointer):
    """Return ``table[byte]`` for sixteen bytes."""

    def build(context, builder, _, given):
        indices = builder.zext(_read(builder, given[1], _I8), _vector(_I64))
        lanes = ir.Constant(_FLOAT_LANES, ir.Undefined)
        for lane in map(_I32, range(WIDTH)):
            value = builder.load(builder.gep(given[0], [builder.extract_element(indices, lane)]))
            lanes = builder.insert_element(lanes, value, lane)
        return lanes

    return LANES(FLOATS, BYTES), build


@intrinsic
def fetch(typing, pointer):
    """Prefetch the cache line at ``pointer``."""

    def build(context, builder, _, given):
        byte_pointer = _I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte_pointer, _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        reading, in_all_caches, data = _I32(0), _I32(3), _I32(1)
        builder.call(prefetch, [builder.bitcast(given[0], byte_pointer), reading, in_all_caches, data])
        return context.get_dummy_value()

    return types.void(pointer), build


@intrinsic
def finish_streams(typing):
    """Wait until streamed stores are visible to other threads."""

    def build(context, builder, _, given):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


@intrinsic
def taken(typing, pointer, amount):
    """Run ``pointer[0] += amount`` atomically and return the value before."""

    def build(context, builder, _, given):
        return builder.atomic_rmw("add", *given, "seq_cst")

    return types.int64(INTS, types.int64), build
