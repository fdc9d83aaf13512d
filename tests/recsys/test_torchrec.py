"""TorchRec's sharded tables through an `Exchange`: the same numbers without bounds, close ones in fewer bytes with."""

import json

import numpy as np
import pytest
from processes import finish, start
from torchrec_ranks import train

from puna.errors import RecipeError

pytest.importorskip("torchrec", reason="needs torchrec 1.8 and fbgemm-gpu-cpu 1.8")


@pytest.mark.parametrize("how", ["table_wise", "column_wise"])
@pytest.mark.parametrize("size", [2, 3])
def test_torchrec_learns_the_same(how, size, tmp_path):
    arms = {"theirs": None, "raw": {"bound": 0.0}, "bounded": {"bound": 0.01, "back": 0.01}}
    words = (str(tmp_path / "out.json"), how, json.dumps(arms))
    assert finish(start(train, *words, size=size, folder=tmp_path)) == [0] * size
    found = json.loads((tmp_path / "out.json").read_text())
    losses = {name: arm["losses"] for name, arm in found.items()}
    assert losses["raw"] == losses["theirs"]
    assert losses["bounded"] != losses["theirs"]
    np.testing.assert_allclose(losses["bounded"], losses["theirs"], rtol=2e-3)
    assert found["raw"]["sent"] == found["raw"]["plain"]
    assert found["bounded"]["sent"] < found["bounded"]["plain"] / 2


def test_a_model_without_sharded_tables_is_refused():
    from torch import nn

    from puna.recsys.torchrec_dist import compress

    with pytest.raises(RecipeError, match="exchanges no pooled embeddings of tables that are whole or cut by columns"):
        compress(nn.Linear(2, 2))
