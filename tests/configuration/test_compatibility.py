import pytest
from conftest import ANCHORS, config, lora, tiny_llama
from peft import IA3Config, get_peft_model

from hf_devft.configuration import Setup, check_compatibility
from hf_devft.configuration.compatibility import CONFLICTS
from hf_devft.configuration.facts import FACTS
from hf_devft.federation.methods import METHODS, FederatedMethod
from hf_devft.models.layout import AdapterLayout, B


def setup(tmp_path, adapter=None, model=None, known=None, **options) -> Setup:
    """Of a config that is fine by itself."""
    layout = None if model is None else AdapterLayout.of(get_peft_model(model, adapter))
    base = None if model is None else tiny_llama()
    return Setup(config(tmp_path, **options), adapter=adapter, layout=layout, base=base, **known or {})


def test_every_fact_is_used_and_every_conflict_is_of_known_ones():
    named = {name for one, other, _ in CONFLICTS for name in (one, other)}
    assert named == set(FACTS)
    pairs = [frozenset(row[:2]) for row in CONFLICTS]
    assert len(pairs) == len(set(pairs)), "one row for a pair"


def test_a_reason_says_what_to_change():
    imperatives = ("leave", "set ", "use ", "pass ", "load ", "lower ", "give ", "group ", "choose ", "join ", "turn ",
                   "shard ")  # fmt: skip
    for one, other, why in CONFLICTS:
        assert any(word in why for word in imperatives), (one, other, why)
        assert not why.endswith("."), "the error adds it"


def test_defaults_conflict_with_nothing(tmp_path):
    check_compatibility(setup(tmp_path, lora(), tiny_llama(), {"num_stages": 2, "mixed_precision": "no"}))


@pytest.mark.parametrize(("options", "message"), [
    ({"grouping": "prefix"}, "grouping='prefix' cannot go with fusion='anchor', .*transfer='broadcast'"),
    ({"federated_method": "fedsa_lora+scaffold"}, "join it with fedit"),
    ({"federated_method": "scaffold", "client_selection": "by_size"}, "weigh gradients and adapters"),
    ({"federated_method": "flora+fedadam"}, "cannot go with federated_method='flora"),
    ({"federated_method": "flora", "transfer": "anchor"}, 'set transfer="broadcast" or "split"'),
    ({"federated_method": "scaffold", "auto_find_batch_size": True}, "leave one out"),
    ({"federated_method": "c2a", "client_selection": "resource_aware"}, "none can come late"),
    ({"beyond_capacity": "keep_last", "federated_method": "fedprox"}, 'beyond_capacity="sit_out"'),
    ({"beyond_capacity": "keep_last"}, "give client_max_layers, or leave it out"),
    ({"beyond_capacity": "keep_last", "client_max_layers": [2, 4], "transfer": "anchor"}, 'set transfer="broadcast"'),
    ({"federated_method": "fedit+median", "round_quorum": 3, "clients_per_round": 3, "upload_fraction": 0.1},
     "set it to 1"),
    ({"temporary_head": True, "wire_dtype": "int4"}, "some of them are dropped"),
    ({"distillation_steps": 3, "temporary_head": True}, "leave it out"),
    ({"predict_with_generate": True, "task": "text-classification"}, "turn it off"),
])  # fmt: skip
def test_a_config_is_refused_by_itself(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(("adapter", "options", "message"), [
    (lora(target_modules=["q_proj", "embed_tokens"]), {"federated_method": "ffa_lora"}, "zero there"),
    (lora(target_modules=["q_proj", "embed_tokens"]), {"federated_method": "flora"}, "cannot add to embeddings"),
    (lora(rank_pattern={"q_proj": 4}), {"federated_method": "hetlora"}, "rank_pattern: it needs one rank"),
    (IA3Config(task_type="CAUSAL_LM"), {"federated_method": "rolora"}, "IA3: use a `LoraConfig`"),
    (lora(target_modules=["q_proj", "lm_head"]), {"temporary_head": True}, "an adapter already"),
    (lora(init_lora_weights="pissa"), {"federated_method": "flexlora"} | ANCHORS, "use another initialisation"),
])  # fmt: skip
def test_an_adapter_is_refused_with_it(tmp_path, adapter, options, message):
    with pytest.raises(ValueError, match=message):
        check_compatibility(setup(tmp_path, adapter, tiny_llama(), **options))


def test_what_a_method_of_ones_own_remembers_is_seen(make_trainer, monkeypatch):
    class KeepsB(FederatedMethod):
        def sends(self, client):
            return self.layout.without(B)

    monkeypatch.setitem(METHODS, "keeps_b", KeepsB)
    with pytest.raises(ValueError, match=r"federated_method=.keeps_b.: .*dropped with the head"):
        make_trainer(federated_method="keeps_b", temporary_head=True)


def test_earlier_names_of_a_methods_attributes_hold_with_a_warning():
    with pytest.warns(FutureWarning, match=r"Late.waits is now called supports_late_updates"):

        class Late(FederatedMethod):
            waits = False

    assert not Late.supports_late_updates


def test_each_is_told_of_what_it_is_about(tmp_path):
    with pytest.raises(ValueError, match="temporary_head=True cannot go with federated_method='scaffold'"):
        config(tmp_path, federated_method="scaffold", temporary_head=True)
    with pytest.raises(ValueError, match=r"DevFTDPOTrainer \(--trainer dpo\) cannot go with auto_find_batch_size"):
        check_compatibility(setup(tmp_path, known={"trainer": "dpo"}, auto_find_batch_size=True))


def test_what_a_client_has_of_its_own_is_not_lost_where_anchors_come_and_go(tmp_path):
    options = {"federated_method": "fedsa_lora", "transfer": "anchor"}
    check_compatibility(setup(tmp_path, known={"num_stages": 2}, **options))
    with pytest.raises(ValueError, match='set transfer="broadcast" or grouping="prefix"'):
        check_compatibility(setup(tmp_path, known={"num_stages": 3}, **options))


def test_orthogonal_factors_are_their_own_layers(tmp_path):
    adapter = lora(init_lora_weights="orthogonal")
    check_compatibility(setup(tmp_path, adapter, adapter_fusion="anchor"))
    with pytest.raises(ValueError, match='set adapter_fusion="anchor"'):
        check_compatibility(setup(tmp_path, adapter, adapter_fusion="mean"))
    for options in ({"federated_method": "flexlora"}, {"wire_dtype": "int4"}):
        with pytest.raises(ValueError, match="orthogonal"):
            check_compatibility(setup(tmp_path, adapter, **options))


def test_only_factors_are_split(tmp_path):
    adapter = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    check_compatibility(setup(tmp_path, adapter, tiny_llama(), **ANCHORS))
    with pytest.raises(ValueError, match='set transfer="broadcast" or "anchor"'):
        check_compatibility(setup(tmp_path, adapter, tiny_llama(), **ANCHORS | {"transfer": "split"}))


def test_layers_are_not_chosen_for_experts(tmp_path):
    """Whose adapters PEFT puts on all layers, whatever was chosen."""
    experts = {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": ["q_proj"]}
    with pytest.raises(ValueError, match="layers_to_transform cannot go with target_parameters"):
        check_compatibility(setup(tmp_path, lora(layers_to_transform=[1], **experts)))
    with pytest.raises(ValueError, match=r"adapter_layers=.* cannot go with target_parameters"):
        check_compatibility(setup(tmp_path, lora(**experts), stage_layers=None, adapter_layers=[1, 4]))


def test_what_is_not_known_conflicts_with_nothing(tmp_path):
    check_compatibility(setup(tmp_path, healing_steps=2))
    with pytest.raises(ValueError, match="pass `calibration_dataset`"):
        check_compatibility(setup(tmp_path, known={"server_rows": False}, healing_steps=2))
    with pytest.raises(ValueError, match="cannot go with a single stage"):
        check_compatibility(setup(tmp_path, known={"num_stages": 1}, healing_steps=2))
