"""The toy that learns to think: a few steps of it."""

from paddlemix.examples.internvl2 import demo_thinking
from paddlemix.models.blocks.conversation import split_thought


def test_it_learns_and_is_a_checkpoint_like_any_other(tmp_path):
    from paddlemix.models.internvl2 import InternVLChatModel, load_tokenizer

    thought, answer = split_thought(demo_thinking.answer_to(7))
    assert answer == "8" and thought.startswith("I count one on from 7")
    model, tokenizer = demo_thinking.make()
    losses = demo_thinking.train(model, tokenizer, 6)
    assert losses[-1] < losses[0] - 1
    model.save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    again = InternVLChatModel.from_pretrained(str(tmp_path), dtype="float32")
    question = demo_thinking.QUESTION.format(3)
    asked = [demo_thinking.ask(m, t, question) for m, t in ((model, tokenizer), (again, load_tokenizer(str(tmp_path))))]
    assert asked[0] == asked[1]
    assert load_tokenizer(str(tmp_path)).require_token_id("</think>") == tokenizer.require_token_id("</think>")
