from megatron_vlm.cli.main import main


def generate(place, capsys, *options) -> str:
    arguments = ["generate", str(place / "run"), "--max-new-tokens", "8", *options]
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_generate_looks_at_the_picture(place, capsys):
    said = {
        generate(place, capsys, "--image", str(place / f"{number}.png"), "--prompt", "what is it?")
        for number in range(3)
    }
    assert len(said) > 1  # of a model with random weights, two may agree


def test_generate_puts_pictures_first_where_no_placeholder_stands(place, capsys):
    picture = ["--image", str(place / "0.png")]
    without = generate(place, capsys, *picture, "--prompt", "what is it?")
    assert generate(place, capsys, *picture, "--prompt", "<image>\nwhat is it?") == without
    assert generate(place, capsys, *picture, "--prompt", "what is <image>?") != without


def test_generate_draws_by_the_seed(place, capsys):
    options = ["--prompt", "what?", "--temperature", "2", "--top-p", "0.95", "--top-k", "200"]
    first, again, other = (generate(place, capsys, *options, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_generate_continues_bare_text(place, capsys):
    bare = generate(place, capsys, "--prompt", "A chat", "--template", "none")
    assert bare != generate(place, capsys, "--prompt", "A chat")


def test_generate_names_a_missing_picture(place, capsys):
    assert main(["generate", str(place / "run"), "--image", "nowhere.png", "--prompt", "x"]) == 65
    assert "image cannot be read: No such file or directory (nowhere.png)" in capsys.readouterr().err


def test_generate_refuses_sampling_that_makes_no_sense(place, capsys):
    assert main(["generate", str(place / "run"), "--prompt", "x", "--top-p", "0"]) == 64
    assert "--top-p 0.0 is out of range" in capsys.readouterr().err


def test_generate_refuses_a_prompt_without_room_for_an_answer(place, capsys):
    assert main(["generate", str(place / "run"), "--prompt", "word " * 5000]) == 64
    assert "1 of 1 prompts fill the 4096 positions of the model" in capsys.readouterr().err
