"""What nvcc makes of the kernels, without a GPU: no spills, and the instructions that the design promises."""

import re
import shutil

import pytest
import resources
import simt_lib

pytestmark = pytest.mark.skipif(
    simt_lib.missing() is not None or shutil.which("nvcc") is None, reason="needs nvcc and g++"
)


def test_hot_kernels():
    table = resources.gather(["sm_90a"], ["hot"], ["bf16"])
    assert len(table) == 3
    for name, row in table.items():
        e = row["sm_90a"]
        assert e["spill"] == 0, name
        assert e["registers"] <= 128 and e["blocks"] >= 3, f"{name}: {e}"
        if resources.cuobjdump() is None:
            pytest.skip("no cuobjdump (neither the toolkit's nor triton's): instructions not checked")
        assert e["HMMA"] >= 16 and e["LDSM"] >= 8 and e["LDGSTS"] >= 4 and e["STG128"] >= 1, f"{name}: {e}"


def test_recorded_table_has_no_spills_in_hot_kernels():
    lines = (simt_lib.HERE / "resources.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) > 100
    head = next(line for line in lines if line.startswith("| kernel"))
    assert all(arch in head for arch in resources.ARCHS)
    column = [cell.strip() for cell in head.split("|")].index
    hot = re.compile(r"TensorTile<(fp16|bf16)|WgradTile<(fp16|bf16), true, ., 16, 16")
    found = 0
    for row in rows:
        cells = row.split("|")
        if hot.search(row):
            found += 1
            assert not any("!" in cells[column(arch)] for arch in ("sm_80", "sm_90a", "sm_100")), row
        # elsewhere (sm_120, element-wise tiles, pools) ptxas may trade a few registers for another resident block
        assert all(int(n) <= 128 for n in re.findall(r"!(\d+)", row)), row
    assert found == 2 * (3 * 6 + 2)  # fprop, prologue, dgrad of six tiles, two of wgrad, in two dtypes


def test_every_kernel_is_in_the_table():
    text = (simt_lib.HERE / "resources.md").read_text()
    for path in simt_lib.KERNELS.glob("*.cuh"):
        for name in re.findall(r"\b(\w+_kernel)\(", path.read_text()):
            assert f"`{name}" in text, f"{name} of {path.name} is not in resources.md: run tests/simt/resources.py"
