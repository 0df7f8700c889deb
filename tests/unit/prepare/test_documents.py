"""A document's way through every step of a source, counted: what is left is what a plain reading of the records says."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prism.core.config import DecontaminateConfig, KeepConfig, PartConfig, PrepareConfig, SampleConfig, TurnsConfig
from megatron_prism.core.errors import InputError
from megatron_prism.data import indexed, mixture, tokenizer
from megatron_prism.jobs import prepare
from megatron_prism.prepare import decontaminate, documents

LANGUAGES = ("python", "cpp", "rust")


def record(index: int) -> dict[str, Any]:
    question = f"question {index % 70} about {'many ' * (index % 70 % 9)}things"  # each question three times, each with another answer
    return {
        "question": question,
        "answer": f"answer {index}",
        "language": LANGUAGES[index % 3],
        "judgement": "right" if index % 5 else "wrong",
    }


RECORDS = [record(index) for index in range(210)]


def written(config: PrepareConfig, tokenizer_folder: Path, name: str = "qa") -> list[str]:
    """Return the training texts that a source was prepared to."""
    reader = indexed.Reader(mixture.read_prepared(config.out).source(name).train.prefixes)
    spec = tokenizer.load(tokenizer_folder, need_eos=True)
    ends = [reader.start(document) for document in range(reader.num_documents + 1)]
    return [tokenizer.decode(reader.tokens(start, end - start), spec).removesuffix("</s>") for start, end in itertools.pairwise(ends)]


@pytest.fixture
def records_file(corpus: Path) -> Path:
    path = corpus / "records.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    return path


def test_sample_takes_so_many_of_each_group_whatever_the_order(make_config: Callable, records_file: Path, tokenizer_folder: Path) -> None:
    right = [item for item in RECORDS if item["judgement"] == "right"]
    sample = SampleConfig(field="language", counts={"python": 20, "cpp": 30})
    changes = {
        "path": (str(records_file),),
        "text": "{language}: {answer}",
        "sample": sample,
        "keep": (KeepConfig(field="judgement", equals="right"),),
    }
    config = make_config(qa=changes)
    (source, _) = prepare.run(config)["sources"]
    found = written(config, tokenizer_folder)
    assert Counter(text.split(":")[0] for text in found) == {"python": 20, "cpp": 30}
    assert set(found) < {f"{item['language']}: {item['answer']}" for item in right}
    assert source["left_out"] == {"keep": len(RECORDS) - len(right), "sample": len(right) - 50}

    records_file.write_text("\n".join(map(json.dumps, [*reversed(RECORDS), *RECORDS[:50]])))  # another order, and some twice
    other = make_config(qa=changes, out=config.out.with_name("other"), num_workers=2)
    prepare.run(other)
    assert sorted(written(other, tokenizer_folder)) == sorted(found)
    reseeded = make_config(qa=changes, out=config.out.with_name("reseeded"), seed=7)
    prepare.run(reseeded)
    assert sorted(written(reseeded, tokenizer_folder)) != sorted(found)
    (records_file.parent / "valid.jsonl").write_text("\n".join(map(json.dumps, RECORDS[:10])))
    held_out = make_config(qa=changes | {"valid_path": (str(records_file.parent / "valid.jsonl"),)}, out=config.out.with_name("held_out"))
    assert prepare.run(held_out)["sources"][0]["valid_documents"] == 8  # all of them that are right: held-out files are not sampled
    short = make_config(qa=changes | {"sample": SampleConfig(counts={"all": 500})}, out=config.out.with_name("short"))
    with pytest.raises(InputError, match=rf"sources.qa.sample.counts.all: found {len(right)} different texts; required 500"):
        prepare.run(short)


@pytest.mark.parametrize("on_bad_record", ["error", "skip"])
def test_a_sample_that_is_short_for_bad_records_says_so(make_config: Callable, records_file: Path, on_bad_record: str) -> None:
    """Only the lots are drawn yet, and a bad record has none: without a word of it the source would seem to be empty."""
    changes = {
        "path": (str(records_file),),
        "text": "{language}: {answer}",
        "sample": SampleConfig(counts={"all": 20}),
        "keep": (KeepConfig(field="judgement", not_equals=-1),),  # a text
    }
    with pytest.raises(InputError) as caught:
        prepare.run(make_config(qa=changes, on_bad_record=on_bad_record))
    assert "sources.qa.sample.counts.all: found 0 different texts; required 20" in str(caught.value)
    assert f"{len(RECORDS)} bad records, the first: {records_file}:1: found field 'judgement' of type str" in str(caught.value)


def test_steps_follow_each_other_and_are_counted(make_config: Callable, records_file: Path, tokenizer_folder: Path, corpus: Path) -> None:
    (corpus / "evaluation.jsonl").write_text(
        json.dumps({"q": "QUESTION 7, about: many many many many many many many things!"}) + '\n{"q": "things"}'
    )
    against = DecontaminateConfig(against=(PartConfig(path=(str(corpus / "evaluation.jsonl"),), text="{q}"),))
    spec = tokenizer.load(tokenizer_folder, need_eos=True)
    least = int(tokenizer.encode_documents([RECORDS[4]["question"]], spec, True)[1][0])  # that one is just long enough
    changes = {"path": (str(records_file),), "text": "{question}", "dedup": "exact", "min_tokens": least}
    config = make_config(qa=changes, decontaminate=against)
    result = prepare.run(config)
    source = result["sources"][0]
    questions = [item["question"] for item in RECORDS]
    dirty = [text for text in questions if text == questions[7]]
    clean = [text for text in questions if text not in dirty]
    long = [text for text in clean if tokenizer.encode_documents([text], spec, True)[1][0] >= least]
    assert len(dirty) == 3 and 0 < len(set(long)) < len(long) < len(clean)
    assert written(config, tokenizer_folder) == list(dict.fromkeys(long))  # the first of equal ones stays, in order
    assert source["left_out"] == {"decontaminate": 3, "min_tokens": len(clean) - len(long), "dedup": len(long) - len(set(long))}
    assert result["decontaminate"] == {"words": "plain-2", "texts": 2, "too_short": 1}
    untouched = make_config(qa=changes | {"decontaminate": False}, decontaminate=against, out=config.out.with_name("untouched"))
    assert "decontaminate" not in prepare.run(untouched)["sources"][0]["left_out"]
    assert dirty[0] in written(untouched, tokenizer_folder)


def test_what_earlier_words_left_in_is_not_taken(make_config: Callable, corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither as a mixture that is there already nor as one that is reused: a Chinese question was one word, too short to be looked for."""
    question = "\u5df2\u77e5\u51fd\u6570\u7684\u5b9a\u4e49\u57df\u4e3a\u5168\u4f53\u5b9e\u6570"
    (corpus / "evaluation.jsonl").write_text(json.dumps({"text": question}) + '\n{"text": "short"}')
    (corpus / "chinese.jsonl").write_text(json.dumps({"text": f"{question}?"}) + '\n{"text": "else"}')
    against = DecontaminateConfig(against=(PartConfig(path=(str(corpus / "evaluation.jsonl"),)),))
    config = make_config(qa={"path": (str(corpus / "chinese.jsonl"),), "text": "{text}"}, decontaminate=against)
    earlier = functools.partial(decontaminate.overlap, rule=re.compile(r"\w+").findall)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decontaminate, "overlap", earlier)
        patch.setattr(documents, "PLAIN_NAME", "plain")
        result = prepare.run(config)
        assert result["sources"][0]["left_out"] == {} and result["decontaminate"]["too_short"] == 2
    documents.evaluation_overlap.cache_clear()
    with pytest.raises(InputError, match=r"found a mixture decontaminated by an earlier rule of words; .*choose another out"):
        prepare.run(config)
    caplog.clear()
    result = prepare.run(replace(config, out=config.out.with_name("new"), reuse=config.out))
    assert result["sources"][0]["left_out"] == {"decontaminate": 1} and result["decontaminate"]["too_short"] == 1
    assert caplog.messages == ["decontaminate: 1 of 2 evaluation texts have fewer than 8 words (shortest) and are not looked for"]


def test_records_of_an_evaluation_set_without_the_field_are_named_with_the_key_that_asks_for_it(
    make_config: Callable, corpus: Path
) -> None:
    """on_bad_record is of the sources: a text that is not searched for would be no decontamination."""
    (corpus / "evaluation.jsonl").write_text('{"Question": "which one is it?"}\n' * 500)
    against = DecontaminateConfig(against=(PartConfig(path=(str(corpus / "evaluation.jsonl"),), text="{prompt}"),))
    with pytest.raises(InputError) as caught:
        prepare.run(make_config(decontaminate=against, on_bad_record="skip"))
    first, *others = caught.value.problems
    assert "no field 'prompt'" in first.found and first.fix == "correct it, or decontaminate.against names another field of its records"
    assert len(others) == 20 and others[-1].found == "500 records without a text"


def test_parts_of_a_source_follow_each_other_each_read_its_own_way(make_config: Callable, corpus: Path, tokenizer_folder: Path) -> None:
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "one?"}, {"role": "assistant", "content": "two."}]
    other = [{"from": "human", "value": "three?"}, {"from": "gpt", "value": "four."}]
    (corpus / "wild.jsonl").write_text(
        "\n".join(json.dumps({"model": model, "conversation": turns}) for model in ("gpt-4-0314", "gpt-3.5-turbo"))
    )
    (corpus / "ultra.jsonl").write_text(json.dumps({"messages": other}))
    parts = (
        PartConfig(
            path=(str(corpus / "wild.jsonl"),),
            turns=TurnsConfig(field="conversation", prefix=True),
            keep=(KeepConfig(field="model", starts_with="gpt-4"),),
        ),
        PartConfig(path=(str(corpus / "ultra.jsonl"),), turns=TurnsConfig()),
    )
    config = make_config(qa={"path": (), "text": "{text}", "parts": parts})
    source = prepare.run(config)["sources"][0]
    assert written(config, tokenizer_folder) == ["User: one?\nAssistant: two.", "three?\nfour."]
    assert [shard["left_out"] for shard in source["shards"]] == [{"keep": 1}, {}]


def test_held_out_files_come_first_and_take_what_training_has_too(make_config: Callable, corpus: Path, tokenizer_folder: Path) -> None:
    (corpus / "valid.jsonl").write_text("\n".join((corpus / "qa.jsonl").read_text().splitlines()[:10]))
    config = make_config(qa={"valid_path": (str(corpus / "valid.jsonl"),), "dedup": "exact"})
    source = prepare.run(config)["sources"][0]
    assert (source["valid_documents"], source["train_documents"]) == (10, 50) and source["left_out"] == {"dedup": 10}
    assert not any(text.startswith(tuple(f"{index}: " for index in range(10))) for text in written(config, tokenizer_folder))


@pytest.mark.parametrize(
    ("against", "where"),
    [
        ({"path": ("absent.jsonl",)}, r"decontaminate.against.0.path: found no file"),
        ({"path": ("EVAL",), "text": "{absent}"}, r"eval.jsonl:1: found no field 'absent'"),
        ({"path": ("EVAL",), "text": "{q}", "keep": (KeepConfig(field="q", equals="x"),)}, "decontaminate.against: found no text"),
    ],
)
def test_evaluation_sets_that_cannot_be_read_are_refused(make_config: Callable, corpus: Path, against: dict, where: str) -> None:
    (corpus / "eval.jsonl").write_text('{"q": "what is it"}')
    part = PartConfig(**against | {"path": tuple(path.replace("EVAL", str(corpus / "eval.jsonl")) for path in against["path"])})
    documents.evaluation_overlap.cache_clear()
    config = make_config(decontaminate=DecontaminateConfig(against=(part,)), on_bad_record="skip")
    with pytest.raises(InputError, match=where):
        prepare.run(config)
    assert not config.out.exists()
