import math

from datasets import Dataset

from hf_immunize.data.images import ImageRows
from hf_immunize.hub.collect import describe_base_model, describe_dataset, describe_ratio, is_hub_id
from hf_immunize.spectra.ratio import ImmunizationRatio
from hf_immunize.text import public_name


def test_public_names_tell_no_path(tmp_path, monkeypatch):
    paths = ["/home/alice/data/pets", "/home/alice/data/pets/", "~/secret/pets", "./a/pets", r"C:\Users\alice\pets"]
    for source in [*paths, "https://alice:password@host/pets?token=x", "a/b/c/pets"]:
        assert public_name(source) == "pets"
    assert public_name("user/pets") == "user/pets" and is_hub_id("user/pets")
    (tmp_path / "user" / "pets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("user/pets") == "pets" and not is_hub_id("user/pets")
    for source, *found in (("google/vit", "google/vit", "abc", True), ("/home/alice/vit", "vit", None, False)):
        base = describe_base_model(source, "abc")
        assert [base.name, base.revision, base.on_hub] == found


def test_data_set_of_the_hub_is_known_by_its_files():
    data = Dataset.from_dict({"image": [1, 2]})
    commit = "a" * 40
    data.info.download_checksums = {f"hf://datasets/user/pets@{commit}/data/x.parquet": {}}
    rows = ImageRows(data, "pets", "image")
    record = describe_dataset(rows, train=[1, 2, 3])
    assert (record.name, record.on_hub, record.revision) == ("user/pets", True, commit)
    assert (record.size, record.train_size, record.fingerprint) == (2, 3, rows.dataset._fingerprint)
    assert describe_dataset([{}, {}]).name == "unnamed images"


def test_undetermined_ratio_is_no_number():
    nan = math.nan
    record = describe_ratio(ImmunizationRatio(nan, nan, 10.0, 2.0, None, "undetermined", "exact"))
    assert (record.log10_rir, record.bound, record.log10_harmful_ratio) == (None, "undetermined", 1.0)
