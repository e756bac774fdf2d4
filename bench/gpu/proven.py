"""What is proven of which kernel, and where: without a GPU in words, on one by the rows of ``gpu-check``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from basisconv_kernels.ops import tucker_conv2d_model as model
from bench.gpu.journal import PASSED
from bench.gpu.tables import Content, device_line, table

MOST_REASONS = 2  # of failures, in a cell of a table

# Subject, what was proven without a GPU in two ways, and the parts of ``gpu-check`` that prove it on one.
PROVEN: tuple[tuple[str, str, str, Callable[[str, str], bool]], ...] = (
    (
        "Triton kernels",
        "float32, float16: forward, gradients, every row of the table",
        "every row, four architectures; gradients in five layouts",
        lambda part, backend: (
            not any(word in part for word in ("tucker", "bits"))
            and (backend == "triton" or part.startswith("tests/triton"))
        ),
    ),
    (
        "ternary, stacked and binary convolutions, `bitpack`, in Triton",
        "float32, float16: every case of the ops, drawn geometries",
        "every tile and form, sm_80 and sm_90",
        lambda part, _: part == "tests/gpu/test_triton_bits.py",
    ),
    (
        "`ternary_conv2d` and stacked filters of real activations on CUDA",
        "every template, in three orders of the threads",
        "sm_90a",
        lambda part, backend: part == "tests/gpu/test_ternary_kernels.py" or ("ternary" in part and backend == "cuda"),
    ),
    (
        "`tucker_conv2d` in Triton, one pass and two",
        "float32, float16: forward, gradients",
        "sm_80, sm_89, sm_90",
        lambda part, backend: "tucker" in part and backend == "triton",
    ),
    (
        "`tucker_conv2d` on the CUDA kernels",
        "its cases and gradients",
        "as the kernels",
        lambda part, backend: "tucker" in part and backend == "cuda",
    ),
    (
        "`tucker_conv2d` on CUDA in one pass",
        "every template, in three orders of the threads",
        "sm_80, sm_90",
        lambda part, backend: backend == model.ONE_PASS,
    ),
    (
        "CUDA kernels",
        "every template, in three orders of the threads",
        "sm_80, sm_90a",
        lambda part, backend: (
            "tucker" not in part
            and backend in ("cuda", "")
            and part.startswith(("tests/gpu/test_cuda", "tests/ops/test_basis"))
        ),
    ),
    (
        "`binary_conv2d`, `bitpack`, stacked filters of bits, on CUDA",
        "every template, in three orders of the threads",
        "sm_80, sm_90, sm_90a",
        lambda part, backend: (
            backend in ("cuda", "")
            and part.startswith(("tests/gpu/test_binary", "tests/ops/test_b", "tests/ops/test_stacked"))
            and not part.startswith("tests/ops/test_basis")
        ),
    ),
    ("wrappers", "by definition, with the same tests", "sm_90a", lambda part, _: part == "tests/gpu/test_wrappers.py"),
    (
        "plain PyTorch, the backend `reference`",
        "on processors, all dtypes",
        "–",
        lambda part, backend: backend == "reference",
    ),
)
LIBRARY = ("the native library", "see below", "what it needs of torch is in a list of what torch 2.11 has")


def proven(check: Content | None) -> str:
    """The table of what is proven where; of the GPU what the newest run of each test said, and for which sources."""
    head = ("", "interpreted or executed on a processor", "compiled, and the machine code read", "on a GPU")
    if check is None:
        return table(head, [*((name, *texts, "not yet") for name, *texts, _ in PROVEN), (*LIBRARY, "not yet")])
    rows = [(name, run, built, _cell(check, belongs)) for name, run, built, belongs in PROVEN]
    ran = sum(part["counts"].get(PASSED, 0) for part in check["rows"] if part["backend"] == "cuda")
    rows.append((*LIBRARY, f"loaded by torch {check['versions']['torch']}" if ran else "not yet"))
    rest = [r for r in check["rows"] if not any(belongs(r["part"], r["backend"]) for *_, belongs in PROVEN)]
    others = ", ".join(dict.fromkeys(f"`{Path(r['part']).name}`" for r in rest))
    rows += [(f"others: {others}", "", "", _cell({**check, "rows": rest}, lambda *_: True))] if rest else []
    return f"{table(head, rows)}\n\nThe last column: {device_line(check)}."


def _cell(check: Content, belongs: Callable[[str, str], bool]) -> str:
    now, before = Counter[str](), Counter[str]()
    wrong: dict[str, int] = {}
    for part in check["rows"]:
        if belongs(part["part"], part["backend"]):
            current = part["sources"] in (check["sources"], "None")
            (now if current else before).update(part["counts"])
            for reason, found in part["wrong"].items():
                wrong[reason] = wrong.get(reason, 0) + found["times"]
    texts = [_counts(now), f"before the last change: {_counts(before)}" if before else ""]
    texts += [f"wrong {times}×: {reason.replace('|', '/')}" for reason, times in list(wrong.items())[:MOST_REASONS]]
    if (more := sum(list(wrong.values())[MOST_REASONS:])) > 0:
        texts.append(f"wrong {more}× alike: `check.json`")
    return "; ".join(filter(None, texts)) or "not yet"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[status]} {status}" for status in sorted(counts, key=lambda s: (s != PASSED, s)))
