import pytest

from hf_devft.cli.arguments import parse_arguments
from hf_devft.cli.recipe import load_data, make_trainer


def write(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def default(tmp_path):
    text = (
        "output_dir: out\nlearning_rate: 1e-3\nstage_layers: [2, 4]\nlora_r: 4\nmodel_init_kwargs: {dtype: float32}\n"
    )
    return write(tmp_path / "default.yaml", text)


def test_a_flag_wins_over_the_file(default):
    recipe, args = parse_arguments(["--lora_r", "16", "--stage_rounds", "3", "5"], default)
    assert (recipe.lora_r, recipe.lora_config(None).r) == (16, 16)
    assert args.stage_rounds == [3, 5]
    assert args.learning_rate == 1e-3
    assert args.model_init_kwargs == {"dtype": "float32"}


@pytest.mark.parametrize(("key", "rival"), [
    ("dataset_name", "train_file"), ("train_file", "dataset_name"), ("dataset_eval_split", "eval_file"),
    ("dataset_eval_split", "train_file"),
])  # fmt: skip
def test_data_of_the_command_line_replaces_the_files_data(tmp_path, key, rival):
    config = write(tmp_path / "data.yaml", f"output_dir: out\n{key}: of-the-file\n")
    recipe, _ = parse_arguments([f"--{rival}", "of-the-line"], config)
    assert (getattr(recipe, key), getattr(recipe, rival)) == (None, ["of-the-line"])


@pytest.mark.parametrize("key", ["eval_file", "eval_fraction", "dataset_eval_split"])
def test_rows_held_out_of_the_clients_replace_the_files_evaluation(tmp_path, key):
    value = 0.2 if key == "eval_fraction" else "test"
    config = write(tmp_path / "data.yaml", f"output_dir: out\ndataset_name: rows\n{key}: {value}\n")
    recipe, args = parse_arguments(["--client_eval_size", "0.1"], config)
    assert getattr(recipe, key) is None
    assert args.client_eval_size == 0.1


@pytest.mark.parametrize("flags", [["--eval_file", "e.jsonl"], ["--eval_fraction", "0.2"],
                                   ["--dataset_eval_split", "test"]])  # fmt: skip
def test_other_rows_replace_the_files_rows_of_the_clients(tmp_path, flags):
    config = write(tmp_path / "data.yaml", "output_dir: out\ndataset_name: rows\nclient_eval_size: 0.1\n")
    assert parse_arguments(flags, config)[1].client_eval_size is None


def test_to_hold_nothing_out_leaves_the_files_evaluation(tmp_path):
    config = write(tmp_path / "data.yaml", "output_dir: out\ndataset_name: rows\neval_file: test.jsonl\n")
    recipe, _ = parse_arguments(["--eval_fraction", "0"], config)
    assert recipe.eval_file == ["test.jsonl"]


def test_a_subset_is_of_a_dataset(tmp_path):
    config = write(tmp_path / "data.yaml", "output_dir: out\ndataset_name: rows\ndataset_config: main\n")
    assert parse_arguments(["--train_file", "mine.jsonl"], config)[0].dataset_config is None
    with pytest.raises(ValueError, match="dataset_config='main' is of a dataset_name"):
        parse_arguments(["--dataset_config", "main", "--output_dir", "out"])


@pytest.mark.parametrize("train", [["--dataset_name", "data"], ["--train_file", "data/train.jsonl"], []], ids=str)
def test_files_to_evaluate_on_are_read_whatever_is_trained_on(tmp_path, monkeypatch, train):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    row = '{"prompt": "a", "completion": "b"}\n'
    write(tmp_path / "data" / "train.jsonl", 20 * row)
    write(tmp_path / "test.jsonl", 3 * row)
    recipe, args = parse_arguments([*train, "--eval_file", "test.jsonl", "--output_dir", str(tmp_path / "out")])
    trained, evaluated, _ = load_data(recipe, args)
    assert len(evaluated) == 3
    assert len(trained) == (20 if train else recipe.task_rows)


def test_a_run_on_own_rows_can_do_without_evaluation(tmp_path):
    rows = write(tmp_path / "rows.jsonl", 40 * '{"prompt": "a", "completion": "b"}\n')
    flags = ["--train_file", str(rows), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true"]
    recipe, args = parse_arguments([*flags, "--eval_strategy", "no"])
    assert args.eval_on_start, "as the config has it"
    assert not make_trainer(recipe, args).args.eval_on_start


def test_clients_of_made_up_tasks_can_hold_rows_out(tmp_path):
    flags = ["--client_eval_size", "0.1", "--output_dir", str(tmp_path), "--use_cpu", "true", "--task_rows", "400"]
    trainer = make_trainer(*parse_arguments(flags))
    assert len(trainer.eval_dataset) == len(trainer.clients.names)


@pytest.mark.parametrize(("flags", "partition"), [
    (["--train_file", "a.csv", "b.csv"], "natural"),
    (["--train_file", "a.csv"], "iid"),
    (["--train_file", "a.csv", "b.csv", "--num_clients", "9"], "iid"),
    (["--train_file", "a.csv", "b.csv", "--partition", "iid"], "iid"),
])  # fmt: skip
def test_a_file_is_a_client_unless_it_is_said_how_rows_are_dealt_out(default, flags, partition):
    for config in ([], ["--config", str(default)]):
        _, args = parse_arguments([*config, *flags])
        assert (args.partition, args.partition_column) == (partition, "source" if partition == "natural" else None)


def test_flags_may_have_hyphens():
    _, args = parse_arguments(["--train-file", "a.csv"])
    assert args.output_dir == "outputs/own-data", "not the quickstart's"


@pytest.mark.parametrize(("argv", "said"), [
    (["--train_file", "a.csv", "--train_file", "b.csv"], "--train_file is given twice"),
    (["--train_file=a.csv", "--train-file", "b.csv"], "--train_file is given twice"),
    (["--num_train_epochs", "3"], "num_train_epochs is not used: an epoch is a stage"),
    (["--bf16_full_eval", "true"], "bf16_full_eval=True cannot be used with .*: set `bf16`"),
    (["--enable_jit_checkpoint", "true"], "enable_jit_checkpoint=True cannot be used"),
    (["--stage_layers", "16", "--max_steps", "200"], "max_steps=200, but stages have .* raise stage_rounds"),
    ([__file__], "Give files after `--train_file`"),
])  # fmt: skip
def test_what_would_not_count_is_refused(argv, said):
    with pytest.raises(ValueError, match=said):
        parse_arguments(argv)


def test_another_config_replaces_the_default(default, tmp_path):
    other = write(tmp_path / "other.yaml", "output_dir: other\nstage_rounds: 9\n")
    recipe, args = parse_arguments(["--config", str(other), "--seed", "3"], default)
    assert (args.output_dir, args.stage_rounds, args.seed, args.stage_layers) == ("other", [9], 3, None)
    assert recipe.model_name_or_path == "embedded"


def test_values_mean_what_they_say(tmp_path):
    text = "output_dir: out\nstage_layers: 16\ntrain_file: a.jsonl\neval_strategy: no\nlora_target_modules: q_proj\n"
    recipe, args = parse_arguments([f"--config={write(tmp_path / 'c.yaml', text)}"], tmp_path / "unused.yaml")
    assert (recipe.train_file, args.stage_layers, args.eval_strategy) == (["a.jsonl"], [16], "no")
    assert recipe.lora_config(None).target_modules == {"q_proj"}
    text = "output_dir: out\nstage_layers: 4 16\nstage_learning_rates: [6e-3, 1e-2]\nclient_max_layers: [4, 16]\n"
    _, args = parse_arguments([], write(tmp_path / "d.yaml", text))
    assert (args.stage_layers, args.stage_learning_rates, args.client_max_layers) == ([4, 16], [6e-3, 1e-2], [4, 16])
    with pytest.raises(ValueError, match=r"stage_rounds='a few' in .*e\.yaml: give a list of whole numbers"):
        parse_arguments([], write(tmp_path / "e.yaml", "output_dir: out\nstage_rounds: a few\n"))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["stage_rounds=2", "seed=5"], "'stage_rounds=2' .* belongs to no flag. Did you mean `--stage_rounds 2`"),
        (["--bf16", "false", "seed"], "'seed' .* belongs to no flag"),
        (["--config", "quickstart"], "--config is given twice"),
    ],
)
def test_words_that_no_flag_takes_are_refused(default, argv, says):
    with pytest.raises(ValueError, match=says):
        parse_arguments(["--config", str(default), *argv])


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("stage_learning_rates: [1e-3, 2e-3]", ["--learning_rate", "1e-5"], {"stage_learning_rates": None}),
        (
            "stage_learning_rates: [1e-3, 2e-3]\ndistillation_steps: 4",
            ["--learning_rate", "1e-5"],
            {"stage_learning_rates": [1e-3, 2e-3], "learning_rate": 1e-5},
        ),
        ("stage_layers: [2, 4]", ["--growth_factor", "1.5"], {"stage_layers": None, "growth_factor": 1.5}),
        ("stage_layers: [2, 4]", ["--initial_layers", "2"], {"stage_layers": None, "initial_layers": 2}),
        ("stage_layers: [2, 4]", ["--adapter_layers", "1", "4"], {"stage_layers": None, "adapter_layers": [1, 4]}),
        (
            "stage_learning_rates: [1e-3, 2e-3]\ndistillation_steps: 4",
            ["--learning-rate", "1e-5", "--distillation-steps", "0"],
            {"stage_learning_rates": None, "learning_rate": 1e-5},
        ),
        ("resume_from_checkpoint: true", [], {"resume_from_checkpoint": True}),
    ],
)
def test_a_flag_wins_over_another_key_of_the_file(tmp_path, text, argv, expected):
    _, args = parse_arguments(argv, write(tmp_path / "file.yaml", f"output_dir: out\n{text}\n"))
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("argv", [["--stage_layer", "2"], ["--stage_layer=2"]])
def test_an_unknown_flag_names_the_nearest(default, argv):
    with pytest.raises(ValueError, match=r"stage_layer.* command line\. Did you mean 'stage_layers'\?"):
        parse_arguments(argv, default)


def test_an_unknown_key_names_the_nearest(tmp_path):
    path = write(tmp_path / "typo.yaml", "output_dir: out\nlerning_rate: 1e-3\n")
    with pytest.raises(ValueError, match=r"'lerning_rate' in .*typo\.yaml\. Did you mean 'learning_rate'"):
        parse_arguments([], path)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just text", "\x00", "? [a]\n: 1\n"])
def test_an_unreadable_yaml_is_an_error(tmp_path, text):
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        parse_arguments([], write(tmp_path / "broken.yaml", text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: c: d\n", "line 2: mapping values are not allowed here"),
        ("seed: 1\noptim_args: {}\nseed: 2\n", "line 3: seed is given twice"),
    ],
)
def test_a_mistake_in_yaml_is_told_with_its_line(tmp_path, text, told):
    with pytest.raises(ValueError, match=rf"broken\.yaml cannot be read: {told}\.$"):
        parse_arguments([], write(tmp_path / "broken.yaml", text))


def test_a_missing_config_is_an_error(default):
    with pytest.raises(ValueError, match=r"there is no config nowhere\.yaml: give"):
        parse_arguments(["--config", "nowhere.yaml"], default)


@pytest.mark.parametrize("server", [[], ["--healing_steps", "2", "--eval_fraction", "0", "--eval_strategy", "no"]])
def test_a_private_run_holds_out_none_of_its_clients_rows(tmp_path, server):
    rows = write(tmp_path / "a.jsonl", '{"prompt": "a", "completion": "b"}\n' * 40)
    flags = [
        "--train_file",
        str(rows),
        "--stage_layers",
        "4",
        "16",
        "--dp_noise_multiplier",
        "1",
        "--dp_delta",
        "1e-3",
    ]
    with pytest.raises(ValueError, match="cannot hold out rows of its clients"):
        load_data(*parse_arguments([*flags, "--output_dir", str(tmp_path / "out"), *server]))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--task_rows", "-5"], "task_rows=-5 is too small: give 1 or more"),
        (["--lora_r", "0"], "lora_r=0 is too small"),
        (["--train_file", "a.jsonl", "--dataset_name", "b"], "train_file and dataset_name are both given"),
        (["--dataset_eval_split", "test"], "dataset_eval_split is a part of dataset_name"),
        (["--dataset_name", "a", "--dataset_eval_split", "test", "--eval_file", "b"], "give either it or eval_file"),
        (["--train_file", "a.jsonl", "--eval_fraction", "1.5"], "eval_fraction=1.5: give a part"),
        (["--eval_fraction", "0.2"], "eval_fraction=0.2 is of one's own rows"),
        (["--train_file", "a", "--eval_file", "b", "--eval_fraction", "0.2"], "eval_fraction=0.2 holds rows out"),
        (["--adapter_name_or_path", "a", "--lora_r", "16"], "--lora_r is of a new adapter"),
        (["--max_steps", "0"], "max_steps=0 trains nothing"),
        (["--learning_rate", "abc"], "argument --learning_rate.*: invalid float value: 'abc'"),
        (["--stage_layers", "16", "4"], r"stage_layers=\[16, 4\] must increase"),
    ],
)
def test_a_wrong_value_is_one_line(default, flags, says):
    with pytest.raises(ValueError, match=says) as error:
        parse_arguments(flags, default)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [["--batch_eval_metrics", "true"], ["--eval_do_concat_batches", "false"]])
def test_what_only_metrics_of_ones_own_take_is_refused(tmp_path, flags):
    recipe, args = parse_arguments([*flags, "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match="is for a `compute_metrics` of your own"):
        make_trainer(recipe, args)


def test_an_owner_keeps_the_rows_that_are_all_it_has(tmp_path):
    files = [write(tmp_path / f"{name}.csv", "prompt,completion\n" + "a,b\n" * count) for name, count in
             (("north", 30), ("south", 1), ("west", 1))]  # fmt: skip
    for seed in range(12):  # in some of them chance holds out south, or west
        flags = ["--train_file", *map(str, files), "--eval_fraction", "0.2", "--seed", str(seed)]
        train, evaluation, _ = load_data(*parse_arguments([*flags, "--output_dir", str(tmp_path / "run")]))
        assert set(train["source"]) == {"north", "south", "west"}
        assert set(evaluation["source"]) == {"north"}
        assert len(train) + len(evaluation) == 32
