"""Reasons as data: a few values, each said in one sentence."""

from __future__ import annotations

import ast
import inspect
import json

from cacheblend_rag import reason
from cacheblend_rag.reason import Reason, RefusedError


def test_each_reason_is_said_in_one_sentence() -> None:
    (members,) = (
        node
        for node in ast.parse(inspect.getsource(reason)).body
        if isinstance(node, ast.ClassDef) and node.name == "Reason"
    )
    body = members.body[1:]  # behind the class's own docstring
    sentences = [ast.literal_eval(n.value) for n in body if isinstance(n, ast.Expr)]
    assert len(sentences) == len(Reason)
    assert all(s.count(". ") == 0 and s.endswith(".") for s in sentences)


def test_a_reason_is_plain_text_where_it_leaves_the_process() -> None:
    assert json.loads(json.dumps({"reason": Reason.MLA})) == {"reason": "mla"}
    assert Reason("mla") is Reason.MLA


def test_a_refusal_reads_as_its_sentence() -> None:
    refused = RefusedError(Reason.MLA, "the model uses MLA")
    assert str(refused) == "the model uses MLA" and refused.why == (Reason.MLA, str(refused))
