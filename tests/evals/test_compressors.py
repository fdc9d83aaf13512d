import shutil
import subprocess

import pytest

from puna.evals.compressors import gzip_bits_per_byte, xz_bits_per_byte

TEXT = "".join(f"def f{i}(x):\n    return x * {i * i}\n" for i in range(3000)).encode()


@pytest.mark.parametrize(("tool", "measure", "slack"), [("gzip", gzip_bits_per_byte, 0), ("xz", xz_bits_per_byte, 16)])
def test_agrees_with_the_command(tool, measure, slack):
    if not shutil.which(tool):
        pytest.skip(f"no {tool} on this machine")
    size = len(subprocess.run([tool, "-9", "-c"], input=TEXT, capture_output=True, check=True).stdout)
    assert measure(TEXT) * len(TEXT) / 8 == pytest.approx(size, abs=slack)


@pytest.mark.parametrize("measure", [gzip_bits_per_byte, xz_bits_per_byte])
def test_same_text_same_figure(measure):
    assert measure(TEXT) == measure(bytes(TEXT)) < 2
