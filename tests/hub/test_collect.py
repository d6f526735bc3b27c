import math

import pytest
from datasets import Dataset

from hf_immunize.data.images import ImageRows
from hf_immunize.hub.collect import describe_base_model, describe_dataset, describe_ratio, is_hub_id
from hf_immunize.spectra.ratio import ImmunizationRatio
from hf_immunize.text import public_name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/alice/data/pets", "pets"),
        ("/home/alice/data/pets/", "pets"),
        ("~/secret/pets", "pets"),
        ("./a/pets", "pets"),
        (r"C:\Users\alice\pets", "pets"),
        ("https://alice:password@host/pets?token=x", "pets"),
        ("user/pets", "user/pets"),
        ("a/b/c/pets", "pets"),
    ],
)
def test_public_name_tells_no_path(source, name):
    assert public_name(source) == name


def test_existing_folder_is_named_by_its_last_part(tmp_path, monkeypatch):
    (tmp_path / "user" / "pets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("user/pets") == "pets"
    assert not is_hub_id("user/pets")


def test_base_model_of_the_hub_keeps_its_revision():
    base = describe_base_model("google/vit", "abc")
    assert (base.name, base.revision, base.on_hub) == ("google/vit", "abc", True)


def test_base_model_in_a_folder_has_no_path():
    base = describe_base_model("/home/alice/vit", "main")
    assert (base.name, base.revision, base.on_hub) == ("vit", None, False)


def test_data_set_of_the_hub_is_known_by_its_files():
    data = Dataset.from_dict({"image": [1, 2]})
    commit = "a" * 40
    data.info.download_checksums = {f"hf://datasets/user/pets@{commit}/data/x.parquet": {}}
    rows = ImageRows(data, "pets", "image")
    record = describe_dataset(rows, train=[1, 2, 3])
    assert (record.name, record.on_hub, record.revision) == ("user/pets", True, commit)
    assert (record.size, record.train_size, record.fingerprint) == (2, 3, rows.dataset._fingerprint)


def test_rows_without_a_name_are_described_all_the_same():
    assert describe_dataset([{}, {}]).name == "unnamed images"


def test_undetermined_ratio_is_no_number():
    nan = math.nan
    record = describe_ratio(ImmunizationRatio(nan, nan, 10.0, 2.0, None, "undetermined", "exact"))
    assert (record.log10_rir, record.bound, record.log10_harmful_ratio) == (None, "undetermined", 1.0)
