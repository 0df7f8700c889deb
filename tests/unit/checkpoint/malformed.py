"""The table of malformed folders: a kind of damage a row, what its refusal names, and the damages of the kind. foreign.py has more rows; test_malformed.py runs them."""

from __future__ import annotations

import os
import shutil

import torch
from safetensors.torch import load_file, save_file

from .damages import (
    CONFIG,
    DEEP,
    FIRST,
    FLOATS,
    GATE,
    INDEX,
    LAYER,
    OUT,
    QUERY,
    SECOND,
    SINGLE,
    TOKENIZER,
    case,
    custom_code,
    data,
    entry,
    header,
    listed,
    moved_out,
    offsets,
    pickles_only,
    rename,
    replaced,
    settings,
    single_too,
    spoiled,
    swapped,
    tensors,
    twice,
    twice_in_a_crowd,
)

HERE, ALONE, PLAIN = f"{FIRST}: {QUERY}: found ", f"{FIRST}: found ", "a plain file name"
TABLE = [
    # tensors
    case("missing tensor", f"hf: {QUERY}: found no such tensor", tensors(lambda found: found.pop(QUERY))),
    case(
        "extra tensor",
        f"{FIRST}: lm_head.bias: found an extra tensor",
        tensors(lambda found: found.update({"lm_head.bias": torch.ones(2)})),
    ),
    case("tensor named as a path", f"{FIRST}: ../../evil: found an extra tensor & hf: {QUERY}", tensors(rename(QUERY, "../../evil"))),
    case(
        "wrong or transposed shape",
        f"{FIRST}: {GATE}: found shape & required shape [24, 16]",
        *(
            tensors(lambda found, shape=shape: found.update({GATE: torch.ones(shape)}))
            for shape in ([23, 16], [16, 24], [384], [24, 16, 1])
        ),
    ),
    case("tensor twice in a header", f"{ALONE} & {QUERY} & twice", header(twice), header(twice_in_a_crowd)),
    case(
        "tensor in two shards",
        f"{SECOND}: {QUERY}: found a tensor that {FIRST} has too",
        lambda root: save_file(load_file(root / SECOND) | {QUERY: torch.ones(16, 16)}, root / SECOND),
    ),
    case("NaN", f"{FIRST}: {OUT}: found nan", *(spoiled(float("nan"), dtype, at) for dtype in FLOATS for at in (0, -1))),
    case(
        "infinity",
        f"{FIRST}: {OUT}: found & inf",
        *(spoiled(sign * float("inf"), dtype, at) for dtype in FLOATS for at in (0, -1) for sign in (1, -1)),
    ),
    # dtypes
    case(
        "mixed dtypes in one Megatron tensor",
        f"{FIRST}: {QUERY}: found parts of dtypes",
        tensors(lambda found: found.update({QUERY: found[QUERY].half()})),
    ),
    case(
        "quantised dtype",
        HERE + "dtype",
        *(
            tensors(lambda found, dtype=dtype: found.update({QUERY: found[QUERY].to(dtype)}))
            for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8)
        ),
    ),
    case("unknown dtype", HERE, *(entry(QUERY, dtype=dtype) for dtype in ("F33", "f32", "", 32, ["F32"], {}, True))),
    # length
    case("cut off in the header", f"{ALONE}a header of", *(data(FIRST, lambda raw, end=end: raw[:end]) for end in (0, 7, 8, 9, 500))),
    case("cut off in the data", f"{ALONE} & truncated", *(data(FIRST, lambda raw, end=end: raw[:end]) for end in (-1, -1000))),
    case("trailing bytes", f"{ALONE} & grown", *(data(FIRST, lambda raw, more=more: raw + more) for more in (b"\0", bytes(4096)))),
    case(
        "header length that lies",
        ALONE,
        *(
            data(FIRST, lambda raw, length=length: length.to_bytes(8, "little") + raw[8:])
            for length in (0, 1, 1000, 40_000, 10**8, 2**31, 2**63, 2**64 - 1)
        ),
    ),
    # header
    case(
        "header of no JSON object",
        ALONE,
        *(
            header(swapped(text))
            for text in (
                b"",
                b"{",
                b"\xef\xbb\xbf{}",
                b"{}\0",
                b'{"\xff": 1}',
                b"[]",
                b"7",
                b"null",
                DEEP,
                b'{"a":' * 100_000,
                b'{"a": ' + b"9" * 5000 + b"}",
            )
        ),
    ),
    case(
        "metadata of no strings",
        ALONE,
        *(header(lambda found, value=value: found.update(__metadata__=value)) for value in (5, ["pt"], {"a": 1}, {"a": None})),
    ),
    case(
        "no entry",
        HERE,
        *(header(lambda found, value=value: found.update({QUERY: value})) for value in (None, [], "F32", 7, {})),
        *(entry(QUERY, **{key: None}) for key in ("dtype", "shape", "data_offsets")),
    ),
    case(
        "overlapping tensors",
        f"{FIRST}: {LAYER}",
        offsets(QUERY, lambda start, end: [start - 64, end - 64]),
        offsets(QUERY, lambda start, end: [0, 1024]),
    ),
    case(
        "gap between tensors",
        f"{FIRST}: {LAYER}",
        header(
            lambda found: [
                found[name].update(data_offsets=[part + 64 for part in found[name]["data_offsets"]])
                for name in found
                if name != "__metadata__" and found[name]["data_offsets"][0] > 30_000
            ],
            bytes(64),
        ),
    ),
    case(
        "reversed or negative offsets",
        HERE,
        offsets(QUERY, lambda start, end: [end, start]),
        offsets(QUERY, lambda start, end: [-1024, 0]),
        offsets(QUERY, lambda start, end: [start - 2**64, end - 2**64]),
    ),
    case(
        "offsets of no two whole numbers",
        HERE,
        *(
            offsets(QUERY, lambda start, end, make=make: make(start, end))
            for make in (
                lambda start, end: [float(start), float(end)],
                lambda start, end: [str(start), str(end)],
                lambda start, end: [start],
                lambda start, end: [],
                lambda start, end: [start, end, end],
                lambda start, end: [None, end],
                lambda start, end: [start, float("inf")],
                lambda start, end: [False, end - start],
                lambda start, end: [10**3000, 10**3000 + 1024],
            )
        ),
    ),
    case(
        "sizes negative or beyond all bounds",
        HERE,
        *(
            entry(QUERY, shape=shape)
            for shape in ([-16, -16], [16, -16], [-1], [2**40, 2**40], [2**63, 2**63, 0], [2**32, 2**32], [10**3000, 10**3000])
        ),
    ),
    case(
        "sizes of no whole numbers",
        HERE,
        *(
            entry(QUERY, shape=shape)
            for shape in ([16.0, 16], [True, 256], ["16", "16"], "16", 256, [[16], 16], [None], {"16": 16}, [float("nan")])
        ),
    ),
    # index
    case(
        "index out of the folder",
        f"{INDEX}: {QUERY}: found & {PLAIN}",
        *(listed(query=file) for file in (f"../hf/{FIRST}", f"/{FIRST}", f"./{FIRST}", f"sub/{FIRST}", f"sub/../{FIRST}", "..", ".", "")),
    ),
    case(
        "index of no file names",
        f"{INDEX}: {QUERY}: found & {PLAIN}",
        *(
            listed(query=file)
            for file in (3, True, [FIRST], {}, f"{FIRST}\0", "\ud800.safetensors", "x" * 300 + ".safetensors", CONFIG, "pytorch_model.bin")
        ),
    ),
    case(
        "index of a shard that is missing",
        "model-00003-of-00003.safetensors: found no such file",
        listed(query="model-00003-of-00003.safetensors"),
        listed(extra="model-00003-of-00003.safetensors"),
    ),
    case(
        "shard that is not listed",
        "model-00003-of-00003.safetensors: found & not",
        lambda root: shutil.copyfile(root / FIRST, root / "model-00003-of-00003.safetensors"),
    ),
    case("index that does not agree with its shards", f"{FIRST}: & {INDEX}", listed(query=SECOND), listed(query=None), listed(extra=FIRST)),
    case(
        "index of no weight_map",
        f"{INDEX}:",
        *(
            data(INDEX, lambda raw, text=text: text)
            for text in (
                b"",
                b"{}",
                b"[]",
                b"3",
                b'{"weight_map": ["a"]}',
                b'{"weight_map": null}',
                b'{"weight_map": "a"}',
                b"{",
                b"\xff",
                DEEP,
            )
        ),
        data(INDEX, lambda raw: raw.replace(b'"weight_map": {', b'"weight_map": {"%s": "%s", ' % (QUERY.encode(), FIRST.encode()))),
    ),
    case("index and single file that disagree", f"{SINGLE}: found & {INDEX}", single_too),
    # files
    case(
        "link out of the folder",
        "found a link out of the folder",
        *map(moved_out, (FIRST, INDEX, CONFIG, TOKENIZER, "tokenizer_config.json")),
    ),
    case(
        "directory, pipe or broken link for a file",
        ": found",
        *(
            replaced(file, make)
            for file in (FIRST, INDEX, CONFIG, TOKENIZER)
            for make in (os.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name), lambda path: path.symlink_to("absent"))
        ),
    ),
    case("pickles only", "hf: found no safetensors weights & pytorch_model.bin & pickled weights are not read", pickles_only),
    # config and tokenizer
    case(
        "tokenizer that is damaged or too large",
        f"{TOKENIZER}: found",
        *(data(TOKENIZER, lambda raw, text=text: text) for text in (b"", b"[]", b"\xff", DEEP)),
        settings(TOKENIZER, normalizer={"type": "Precompiled"}),  # here the library panics, which is no Exception
        lambda root: (
            tensors(lambda found: found.update({"model.embed_tokens.weight": torch.ones(383, 16)}))(root),
            settings(vocab_size=383)(root),
            save_file(load_file(root / SECOND) | {"lm_head.weight": torch.ones(383, 16)}, root / SECOND),
        ),
    ),
    case(
        "embedding of another size than vocab_size",
        f"{FIRST}: model.embed_tokens.weight: found shape [390, 16] & {SECOND}: lm_head.weight",
        settings(vocab_size=389),
        settings(vocab_size=391),
        settings(vocab_size=10**6),
    ),
    case(
        "config that is no JSON object",
        f"{CONFIG}: found",
        *(data(CONFIG, lambda raw, text=text: text) for text in (b"", b"[]", b"{", b"\xff", b"7", DEEP)),
        lambda root: (root / CONFIG).unlink(),
        data(CONFIG, lambda raw: raw.replace(b"{", b'{"vocab_size": 1, ', 1)),
    ),
    case(
        "config of wrong types",
        f"{CONFIG}:hidden_size: found",
        *(settings(hidden_size=value) for value in ("16", True, -16, 0, 1e30, 16.0, None, [16], 10**30)),
    ),
    case(
        "config of values without sense",
        f"{CONFIG}:",
        *(
            settings(**{key: value})
            for key, value in (
                ("rms_norm_eps", float("nan")),
                ("rms_norm_eps", -1e-5),
                ("rope_theta", float("inf")),
                ("rope_theta", 0),
                ("num_hidden_layers", 10**9),
                ("num_key_value_heads", -2),
                ("head_dim", 10**3000),
                ("num_attention_heads", 10**3000),
                ("tie_word_embeddings", "no"),
                ("initializer_range", -1),
                ("rope_scaling", {"rope_type": "llama3", "factor": float("nan")}),
            )
        ),
        settings(architectures=["GraniteMoeHybridForCausalLM"], layer_types=7),
    ),
    case(
        "heads that do not divide",
        f"{CONFIG}:num_key_value_heads: found 3 & a divisor of num_attention_heads",
        settings(num_key_value_heads=3),
    ),
    case(
        "unknown architecture",
        f"{CONFIG}:architectures: found",
        custom_code("CustomForCausalLM"),
        *(
            settings(architectures=value)
            for value in (None, [], "LlamaForCausalLM", 7, True, [7], [["LlamaForCausalLM"]], [{}], {"LlamaForCausalLM": 1})
        ),
    ),
]
