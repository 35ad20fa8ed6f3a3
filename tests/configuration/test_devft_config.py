import json

import pytest
from conftest import config
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_devft import StageConfig
from hf_devft.federation.partition import PARTITIONS
from hf_devft.files import write_json
from hf_devft.stages import FUSIONS, GROUPINGS, TRANSFERS


def layers(stages):
    return [stage.num_layers for stage in stages]


@pytest.mark.parametrize(
    ("option", "registry"),
    [("grouping", GROUPINGS), ("fusion", FUSIONS), ("transfer", TRANSFERS), ("partition", PARTITIONS)],
)
def test_a_registered_rule_is_a_choice(tmp_path, monkeypatch, option, registry):
    with pytest.raises(ValueError, match=f"{option}='mine' is unknown"):
        config(tmp_path, **{option: "mine"})
    monkeypatch.setitem(registry, "mine", next(iter(registry.values())))
    assert getattr(config(tmp_path, **{option: "mine"}), option) == "mine"


def test_an_earlier_name_of_an_option_holds_with_a_warning(tmp_path):
    with pytest.warns(FutureWarning, match="wire_top_k is now called upload_fraction"):
        args = config(tmp_path, wire_top_k=0.5)
    assert args.upload_fraction == 0.5
    with pytest.raises(ValueError, match="leave wire_top_k out"):
        config(tmp_path, wire_top_k=0.5, upload_fraction=0.2)


@pytest.mark.parametrize("option", ["transfer", "grouping", "wire_dtype", "client_selection", "partition"])
def test_an_option_that_needs_a_name_has_one(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option}=None is unknown"):
        config(tmp_path, **{option: None})


@pytest.mark.parametrize(
    ("depth", "expected"), [(32, [4, 8, 16, 32]), (16, [4, 8, 16]), (24, [4, 8, 16, 24]), (3, [3])]
)
def test_derived_capacities_double_up_to_the_depth(tmp_path, depth, expected):
    assert layers(config(tmp_path, stage_layers=None).resolve_stages(depth)) == expected


def test_the_papers_forty_layers(tmp_path):
    assert layers(config(tmp_path, stage_layers=None, initial_layers=5).resolve_stages(40)) == [5, 10, 20, 40]


@given(depth=st.integers(1, 100), initial=st.integers(1, 120), growth=st.floats(1.001, 10))
@settings(deadline=None, max_examples=50)
def test_derived_capacities_always_increase_and_end_at_the_depth(tmp_path_factory, depth, initial, growth):
    run = config("unused", stage_layers=None, initial_layers=initial, growth_factor=growth)
    found = layers(run.resolve_stages(depth))
    assert found == sorted(set(found))
    assert found[-1] == depth


def test_one_value_or_one_per_stage(tmp_path):
    stages = config(tmp_path, stage_rounds=[3, 5], stage_learning_rates=[1e-3, 2e-3]).resolve_stages(4)
    assert [(stage.rounds, stage.learning_rate) for stage in stages] == [(3, 1e-3), (5, 2e-3)]
    assert [stage.rounds for stage in config(tmp_path, stage_rounds=7).resolve_stages(4)] == [7, 7]


@pytest.mark.parametrize(("options", "message"), [
    ({"stage_layers": [4, 2]}, "must increase"),
    ({"stage_layers": [2, 2, 4]}, "must increase"),
    ({"stage_layers": [0, 4]}, "must increase"),
    ({"stage_rounds": [1, 2, 3]}, "one for each of 2 stages"),
    ({"stage_rounds": [0]}, "1 round or more"),
    ({"stage_learning_rates": [1e-3, -1e-3]}, "above 0"),
    ({"grouping": "spectral"}, "choose one of deconfliction"),
    ({"fusion": "max"}, "choose one of differential"),
    ({"transfer": "none"}, "choose one of broadcast"),
    ({"partition": "dirichlet"}, "needs `partition_column`"),
    ({"clients_per_round": 5}, "more than num_clients=4"),
    ({"local_steps": 0}, "too small"),
    ({"growth_factor": 1.0}, "which grows"),
    ({"dirichlet_alpha": 0.0}, "above 0"),
    ({"num_train_epochs": 5}, "stage_rounds"),
    ({"optim": "schedule_free_adamw"}, "start afresh"),
    ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "one data loader"),
    ({"client_placement": "somewhere"}, "choose one of client_parallel, data_parallel"),
    ({"round_quorum": 3}, "never be reached by clients_per_round=2"),
    ({"client_dropout_rate": 1.0}, "from 0 to below 1"),
    ({"fsdp": True}, "ZeRO-3"),
    ({"stage_layers": "4 16"}, "stage_layers='4 16': give a list of whole numbers"),
    ({"stage_layers": 16}, "stage_layers=16: give a list"),
    ({"stage_layers": []}, r"stage_layers=\[\] must increase, from 1 or more"),
    ({"stage_layers": [4.5, 16]}, "give a list of whole numbers"),
    ({"stage_rounds": "many"}, "stage_rounds='many': give a list"),
    ({"stage_rounds": None}, "stage_rounds=None: give a list"),
    ({"stage_rounds": 2.5}, "stage_rounds=2.5: give a list of whole numbers"),
    ({"stage_learning_rates": ["fast"]}, "give a list of numbers"),
    ({"federated_method": ["fedit"]}, "is no text: join names"),
    ({"model_init_kwargs": {"dtype": "float33"}}, "dtype='float33' is unknown: give float32"),
    ({"num_clients": "5"}, "num_clients='5' is text: give a number"),
    ({"learning_rate": "fast"}, "learning_rate='fast' is text"),
])  # fmt: skip
def test_bad_values_say_what_to_change(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_an_fsdp_launch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="ZeRO-3"):
        config(tmp_path)


def stage_config(**kwargs) -> StageConfig:
    defaults = {"stage": 1, "num_stages": 2, "num_layers": 2, "full_layers": 4, "rounds": 3, "learning_rate": 1e-3}
    return StageConfig(**defaults | {"groups": [[0, 1], [2, 3]], "metrics": {"loss": 1.5}} | kwargs)


def test_stage_config_round_trip(tmp_path):
    stage_config().save_pretrained(tmp_path / "stage-1")
    assert StageConfig.from_pretrained(tmp_path / "stage-1") == stage_config()
    assert StageConfig.from_pretrained(tmp_path, subfolder="stage-1") == stage_config()


def test_stage_config_of_a_newer_version_is_read(tmp_path):
    stage_config().save_pretrained(tmp_path)
    path = tmp_path / "stage_config.json"
    write_json(path, json.loads(path.read_text()) | {"colour": "blue"})
    assert StageConfig.from_pretrained(tmp_path) == stage_config()


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\xff"])
def test_a_broken_stage_config_is_an_error(tmp_path, content):
    (tmp_path / "stage_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"stage_config\.json is "):
        StageConfig.from_pretrained(tmp_path)


def test_a_mapping_is_read_however_it_is_written(tmp_path):
    assert config(tmp_path, model_init_kwargs=' {"dtype": "float32"}').model_init_kwargs == {"dtype": "float32"}


def test_batches_come_in_their_clients_order(tmp_path):
    with pytest.raises(ValueError, match="dataloader_in_order=False would give a client another one's batches"):
        config(tmp_path, dataloader_in_order=False)
