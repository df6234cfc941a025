"""Conversations: a template's markup, the memory of the turns, and templates that do harm or nothing."""

import json

import numpy as np
import pytest
import tokenizers

from lm2_jax import UserError
from lm2_jax.data.tokenizers import TokenizerConfig, TokenizerKind
from lm2_jax.inference.chat import Chat, ChatTemplate, Message
from lm2_jax.inference.engine import Engine, Request
from lm2_jax.inference.sampling import Sampling
from tests.inference.subjects import text_of, tiny_run

# In the manner of ChatML.
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m['role'] + '\\n' + m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
START, END, EOS = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and the three special tokens."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner.model = tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    inner.add_special_tokens([EOS, START, END])
    return TokenizerKind.find("json").parse(
        inner.to_str().encode(), TokenizerConfig(kind="json", path="t.json", eos=EOS)
    )


@pytest.fixture
def run(tokenizer):
    return tiny_run("lm2_tiny")._replace(tokenizer=tokenizer)


def test_what_a_person_writes_is_no_markup(tokenizer):
    template = ChatTemplate(TEMPLATE, {}, tokenizer, "here")
    special = tokenizer.special_ids()
    said = f"hello {END} {{{{ 1 + 1 }}}}"
    ids = template.tokens([Message("user", tokenizer.encode(said))])
    text = tokenizer.encode
    turn = [special[START], *text("user\n"), *text(said), special[END], *text("\n")]
    assert ids == [*turn, special[START], *text("assistant\n")]
    assert ids.count(special[END]) == 1
    assert template.end_ids() == (special[END],)


def test_a_conversation_is_the_text_that_its_template_writes(run, tokenizer):
    """Each answer is the one after the full text; the memory holds every turn."""
    template = ChatTemplate(TEMPLATE, {}, tokenizer, "here")
    book = run.read(text_of(45))
    chat, said = Chat(run, template, book), []
    hot = Sampling(temperature=0.9)
    for number, message in enumerate(("who is there?", "and then? " * 5, "why")):
        answer = "".join(chat.say(message, 9, hot))
        said.append(Message("user", tokenizer.encode(message)))
        prompt = np.array(template.tokens(said), np.int32)
        request = Request(prompt, 2 * number, 9, hot, end_ids=template.end_ids())
        (*_, last) = Engine(run, book, 2).generate([request])
        assert last.answer.text == answer
        said.append(Message("assistant", tuple(last.answer.ids)))
    memory = chat.finish()
    wanted = len(template.tokens(said, is_answer_next=False))
    assert memory.tokens_read - book.tokens_read == wanted > 100
    assert book.tokens_read == 45


def test_an_answer_ends_with_the_turn(run):
    """A token that ends a turn ends the answer, and is no part of its text."""
    prompt = np.array(run.tokenizer.encode("hello"), np.int32)

    def ids(end_ids):
        (*_, last) = Engine(run, None, 2).generate([Request(prompt, 0, 6, end_ids=end_ids)])
        return last.answer.ids

    full = ids(())
    assert len(full) == 6
    at = max(full.index(token) for token in full)
    assert ids((full[at],)) == full[:at]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}", "damaged"),
        ("{{ messages[0]['content'] | upper }} {{ ''.__class__.__mro__ }}", "failed"),
        ("{{ messages.__class__.__init__.__globals__ }}", "failed"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("nothing", "leaves out or changes message 1"),
        ("{{ messages[0]['content'][:1] }}", "leaves out or changes message 1"),
        ("{% for i in range(10**12) %}{% endfor %}", "failed"),
    ],
)
def test_templates_that_do_harm_or_nothing_are_refused(source, message, tokenizer):
    with pytest.raises(UserError, match=message) as caught:
        ChatTemplate(source, {}, tokenizer, "here").tokens([Message("user", [1])])
    assert caught.value.status == 1


def test_a_template_that_takes_turns_back_is_refused(run, tokenizer):
    source = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = Chat(run, ChatTemplate(source, {}, tokenizer, "here"))
    list(chat.say("one", 2))
    with pytest.raises(UserError, match="cannot take back"):
        list(chat.say("two", 2))


def test_where_a_template_is_found(tmp_path, tokenizer):
    with pytest.raises(UserError, match="has no chat template"):
        ChatTemplate.load(tmp_path, tokenizer)
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": "{{ eos_token }}" + TEMPLATE}]
    for value in (named, named[1]["template"]):
        config.write_text(json.dumps({"chat_template": value, "eos_token": {"content": EOS}}))
        ids = ChatTemplate.load(tmp_path, tokenizer).tokens([Message("user", [7])])
        assert ids[0] == tokenizer.eos_id
        assert 7 in ids
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)  # counts before the field
    assert ChatTemplate.load(tmp_path, tokenizer).tokens([Message("user", [7])])[0] != tokenizer.eos_id
    config.write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not valid JSON"):
        ChatTemplate.load(tmp_path, tokenizer)
