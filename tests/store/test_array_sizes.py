"""A file of arrays that unpacks to more than is read is refused before it is unpacked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorabench.store import arrays


def test_a_small_file_that_unpacks_to_hundreds_of_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MAX_UNPACKED", 1 << 20)
    path = tmp_path / "test.npz"
    path.write_bytes(arrays.pack_columns({"loss": np.zeros(1 << 18)}))
    assert path.stat().st_size < 1 << 14
    with pytest.raises(ValueError, match=r"test\.npz unpacks to 2 MiB; at most 1 MiB are read"):
        arrays.read_columns(path, tmp_path)
    path.write_bytes(arrays.pack_columns({"loss": np.zeros(1 << 16)}))
    assert arrays.read_columns(path, tmp_path)["loss"].shape == (1 << 16,)
