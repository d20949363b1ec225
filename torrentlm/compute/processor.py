"""The processor: its maker's name for it, and those of its instructions that matrix products gain from.

Standard library only; what a system does not tell is left out.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

X86_FLAGS = {
    "avx2": "AVX2",
    "f16c": "F16C",
    "avx512f": "AVX512",
    "avx512_bf16": "AVX512-BF16",
    "avx512_fp16": "AVX512-FP16",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
    "amx_fp16": "AMX-FP16",
}
ARM_FEATURES = {
    "asimd": "NEON",
    "neon": "NEON",
    "asimdhp": "FP16",
    "asimddp": "DOTPROD",
    "bf16": "BF16",
    "i8mm": "I8MM",
    "sve": "SVE",
    "sve2": "SVE2",
    "sme": "SME",
}
APPLE_KEYS = {
    "hw.optional.avx2_0": "AVX2",
    "hw.optional.AdvSIMD": "NEON",
    "hw.optional.arm.FEAT_FP16": "FP16",
    "hw.optional.arm.FEAT_DotProd": "DOTPROD",
    "hw.optional.arm.FEAT_BF16": "BF16",
    "hw.optional.arm.FEAT_I8MM": "I8MM",
    "hw.optional.arm.FEAT_SME": "SME",
}
_CPUINFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """What its maker calls it; the architecture where nobody says."""
    described = parse_cpuinfo(_cpuinfo())
    name = described.get("model name") or described.get("hardware")
    if not name and platform.system() == "Darwin":
        name = _sysctl("machdep.cpu.brand_string")
    return name or platform.processor() or platform.machine()


def instruction_sets() -> tuple[str, ...]:
    """Those of the tables above that this processor has, in their order."""
    if platform.system() == "Darwin":
        return tuple(name for key, name in APPLE_KEYS.items() if _sysctl(key) == "1")
    return parse_instruction_sets(_cpuinfo())


def computes_slowly(dtype: str, instructions: Collection[str]) -> bool:
    """Whether a processor with these instruction sets may take longer for products in BF16 or F16 than in F32, for want
    of instructions that read them: only measuring tells."""
    return dtype in _READ_BY and not _READ_BY[dtype].intersection(instructions)


_READ_BY = {
    "BF16": frozenset(("AVX512-BF16", "AMX-BF16", "BF16")),
    "F16": frozenset(("F16C", "AVX512", "AVX512-FP16", "AMX-FP16", "FP16")),
}


def parse_cpuinfo(text: str) -> Mapping[str, str]:
    """The first processor of a /proc/cpuinfo, its keys in lower case."""
    first = text.strip().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def parse_instruction_sets(text: str) -> tuple[str, ...]:
    """The same of a /proc/cpuinfo."""
    described = parse_cpuinfo(text)
    flags = set(f"{described.get('flags', '')} {described.get('features', '')}".lower().split())
    known = ARM_FEATURES if "features" in described else X86_FLAGS
    return tuple(dict.fromkeys(name for flag, name in known.items() if flag in flags))


def _cpuinfo() -> str:
    try:
        return _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sysctl(key: str) -> str:
    try:
        command = ("/usr/sbin/sysctl", "-n", key)
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
