"""Machine code of Triton kernels for cards that need not be there, and what it needs of them.

``recorded`` notes what launchers would launch, ``measure`` compiles it and reads the machine code.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel, make_backend
from triton.runtime.driver import driver

from squid_fast.kernels.card import A100, H100, MI300X, Card, assume

CARDS = {A100.arch: A100, H100.arch: H100, MI300X.arch: MI300X}

Row = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """A compilation that Triton would start: ``data`` is all that it depends on, as JSON."""

    arch: str
    module: str
    kernel: str
    data: str


class _Absent:
    """Takes the place of a GPU's driver and says what GPU it is, which is all it can."""

    def __init__(self, card: Card) -> None:
        self.arch = card.arch
        if card.is_amd:
            self.target = GPUTarget("hip", card.arch, 64)
        else:
            self.target = GPUTarget("cuda", int(card.arch.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.arch  # the key under which a kernel keeps what belongs to a device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def recorded(card: Card) -> Iterator[list[Launch]]:
    """The launches made inside, configured for ``card`` and neither compiled nor launched."""
    launches: list[Launch] = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        data = json.loads(compile["specialization_data"])
        launches.append(Launch(card.arch, fn.module, fn.name, json.dumps(data | {"key": ""})))
        return True  # that it has been seen to

    driver.set_active(_Absent(card))
    with knobs.runtime.scope(), assume(card):
        knobs.runtime.jit_cache_hook = note
        yield launches


def describe(launch: Launch) -> Row:
    """What is known of a launch before it is compiled."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    data = json.loads(launch.data)
    plain = make_backend(_Absent(CARDS[launch.arch]).target).parse_options({}).__dict__
    # extern_libs are paths on this machine.
    options = {
        name: value
        for name, value in data["options"].items()
        if name != "extern_libs" and json.dumps(plain[name]) != json.dumps(value)
    }
    options |= {name: data["options"][name] for name in ("num_warps", "num_stages")}
    values = dict(zip((i for (i,) in data["constant_keys"]), data["constant_vals"], strict=True))
    attributes = zip(data["attrs_keys"], data["attrs_vals"], strict=True)
    aligned = {i for (i,), attrs in attributes if attrs}
    constants, arguments = {}, {}
    for index, (name, kind) in enumerate(data["signature"].items()):
        if kernel.params[index].is_constexpr:
            constants[name] = values[index]
        else:  # as Triton's own tools write it: *bf16:16 is an aligned pointer
            kind = str(values[index]) if kind == "constexpr" else kind
            arguments[name] = kind + ":16" * (index in aligned)
    dtypes = {kind.strip("*").split(":")[0] for kind in arguments.values() if kind[0] == "*"}
    return {
        "file": launch.module.rpartition(".")[2],
        "kernel": launch.kernel,
        "arch": launch.arch,
        "dtypes": sorted(dtypes - {"i64", "i32"}),
        "constants": constants,
        "options": options,
        "arguments": arguments,
    }


@contextmanager
def _overheard() -> Iterator[list[str]]:
    """What the compiler itself writes to stderr inside: the reasons among pages of dumps."""
    reasons: list[str] = []
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield reasons
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            text = file.read().decode(errors="replace")
            known = r"(?<=error: )[^\n]{,200}|Pipeline failed while executing \[`\w+`"
            reasons += dict.fromkeys(re.findall(known, text))


def measure(launch: Launch) -> Row:
    """Compile one launch and read its machine code."""
    driver.set_active(_Absent(CARDS[launch.arch]))
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    row = describe(launch)
    try:
        with _overheard() as reasons:
            compiled = kernel.preload(launch.data)
    except Exception as error:
        # Of errors in a kernel's own text, which they quote, the last line says what is wrong.
        last = str(error).strip().rpartition("\n")[2]
        return row | {"error": " ".join([f"{type(error).__name__}: {last}.", *reasons])}
    ttir, ttgir = compiled.asm["ttir"], compiled.asm["ttgir"]
    operands = r"tensor<([\dx]+)x(\w+)> \* tensor<[\dx]*?(\d+)x[a-z]\w+>"
    dots = re.findall(rf"= tt\.dot .* : {operands}", ttir)
    plain = re.findall(r"= tt\.dot .* -> tensor<[^>]*#blocked", ttgir)
    read = _read_amd if CARDS[launch.arch].is_amd else _read_nvidia
    return row | {
        # rows x depth x columns, and of what
        "dots": sorted({f"{left}x{columns} {dtype}" for left, dtype, columns in dots}),
        "dots_without_matrix_unit": len(plain),
        "unwaited_products": _unwaited_products(ttgir),
        "shared_bytes": compiled.metadata.shared,
        **read(compiled),
    }


def _unwaited_products(ttgir: str) -> int:
    """Loops whose step ends while a warpgroup may still read a product's rows from registers.

    The next step may overwrite them before that (triton-lang/triton#9433), which only a card would
    show, and by chance.
    """
    found, reading = 0, False
    for operation in re.findall(r"ttng\.warp_group_dot.*|scf\.yield", ttgir):
        if operation == "scf.yield":
            found, reading = found + reading, False
        elif "warp_group_dot_wait" in operation:
            reading = reading and "pendings = 0" not in operation
        else:  # the rows are in shared memory or, as a tensor, in registers
            reading = reading or ": tensor<" in operation
    return found


def _read_nvidia(compiled: CompiledKernel) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def ask(option: str) -> str:
            tool = [knobs.nvidia.cuobjdump.path, option, file.name]
            return subprocess.run(tool, check=True, capture_output=True, text=True).stdout

        used = dict(re.findall(r"\b(REG|STACK):(\d+)", ask("-res-usage")))
        # Disassembly is slow, and not needed to know that there is nothing to be found.
        found = "tt.dot" in compiled.asm["ttir"] or used["STACK"] != "0"
        # The mnemonic behind the address and, if there is one, the predicate.
        code = ask("-sass") if found else ""
    counts = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?([A-Z]\w*)", code))
    return {
        "registers": int(used["REG"]),
        # The kernels have no arrays of their own: what is on a thread's stack is spilled.
        "spilled_bytes": int(used["STACK"]),
        "spill_instructions": counts["LDL"] + counts["STL"],
        "matrix_instructions": {k: counts[k] for k in ("HMMA", "HGMMA") if counts[k]},
        "code_bytes": _code_bytes(compiled.asm["cubin"]),
    }


def _code_bytes(elf: bytes) -> int:
    """Size of the sections of a 64-bit ELF file that are executed."""
    (start,) = struct.unpack_from("<Q", elf, 40)
    entry_size, count = struct.unpack_from("<HH", elf, 58)
    total = 0
    for entry in range(start, start + entry_size * count, entry_size):
        flags, _, _, size = struct.unpack_from("<4Q", elf, entry + 8)
        total += size if flags & 4 else 0
    return total


def _read_amd(compiled: CompiledKernel) -> Row:
    text = compiled.asm["amdgcn"]

    def value(name: str) -> int:
        return int(re.findall(rf"{name}\s*[:=]\s*(\d+)", text)[-1])

    mfma = len(re.findall(r"^\s+v_mfma_", text, re.MULTILINE))
    return {
        "registers": value(r"\.vgpr_count"),  # vector registers, those of the matrix unit included
        "spilled_bytes": value(r"\.private_segment_fixed_size"),
        "spill_instructions": len(re.findall(r"^\s+scratch_(?:load|store)", text, re.MULTILINE)),
        "matrix_instructions": {"MFMA": mfma} if mfma else {},
        "code_bytes": value("codeLenInByte"),
    }
