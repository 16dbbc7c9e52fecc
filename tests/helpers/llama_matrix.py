"""Every way in which LlamaIndex brings retrieved nodes into a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatStartEvent, LLMCompletionStartEvent
from llama_index.core.node_parser import (
    HierarchicalNodeParser,
    SentenceSplitter,
    SentenceWindowNodeParser,
    get_leaf_nodes,
)
from llama_index.core.postprocessor import (
    LongContextReorder,
    MetadataReplacementPostProcessor,
    SimilarityPostprocessor,
)
from llama_index.core.query_engine import (
    CitationQueryEngine,
    RetrieverQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
)
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.retrievers import AutoMergingRetriever, BaseRetriever
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import QueryEngineTool

from llama_index_cacheblend import CacheBlendIngestion, CacheBlendLLM

DATA = Path(__file__).parents[2] / "examples" / "data"
SELECTED = '[{"choice": 2, "reason": "it knows"}]'
ASKED = '{"items": [{"sub_question": "When?", "tool_name": "docs"}]}'
HELD_TOKENS = 64
QUESTION = "When does the last ferry leave?"
EMBED = MockEmbedding(embed_dim=8)


class Case(NamedTuple):
    """Runs one query; what it returns is what the prompts should contain, text by text."""

    run: Callable[[CacheBlendLLM], Sequence[str]]
    at_least: float = 0.99  # the share of these texts' tokens that must be found
    answer: str = ""  # what a fake engine must say first for the query to go on


def documents() -> list[Document]:
    """Three documents, with metadata that prompts show."""
    return [
        Document(text=path.read_text(), id_=path.stem, metadata={"file_path": path.name})
        for path in sorted(DATA.glob("*.md"))[:3]
    ]


def split(size: int = 256) -> list[BaseNode]:
    return SentenceSplitter(chunk_size=size, chunk_overlap=0).get_nodes_from_documents(documents())


class Retrieve(BaseRetriever):
    """Retrieves the nodes it was given."""

    def __init__(self, nodes: Sequence[BaseNode]) -> None:
        super().__init__()
        self.nodes = nodes

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=n, score=1 - i / 100) for i, n in enumerate(self.nodes)]


def texts_of(nodes: Sequence[BaseNode], mode: MetadataMode = MetadataMode.LLM) -> list[str]:
    return [node.get_content(mode).strip() for node in nodes]


def ingest(llm: CacheBlendLLM, nodes: Sequence[BaseNode], **options: Any) -> None:
    CacheBlendIngestion(llm, show_progress=False, **options).ingest(nodes)


def engine(llm: CacheBlendLLM, nodes: Sequence[BaseNode], **options: Any) -> Any:
    return RetrieverQueryEngine.from_args(Retrieve(nodes), llm=llm, **options)


# --- one function a case --------------------------------------------------------------------------


def response_mode(name: str, **options: Any) -> Callable[[CacheBlendLLM], Sequence[str]]:
    def run(llm: CacheBlendLLM) -> Sequence[str]:
        nodes = split()[:4]
        ingest(llm, nodes)
        answer = engine(llm, nodes, response_mode=name, **options).query(QUESTION)
        if options.get("streaming"):
            list(answer.response_gen)
        return texts_of(nodes)

    return run


def chat_engine(kind: Any) -> Callable[[CacheBlendLLM], Sequence[str]]:
    def run(llm: CacheBlendLLM) -> Sequence[str]:
        nodes = split()[2:6]
        ingest(llm, nodes)
        chat = kind.from_defaults(retriever=Retrieve(nodes), llm=llm, system_prompt="Be brief.")
        chat.chat(QUESTION)
        list(chat.stream_chat("And the first?").response_gen)
        return texts_of(nodes) * 2

    return run


def from_index(llm: CacheBlendLLM) -> Sequence[str]:
    hook = CacheBlendIngestion(llm, show_progress=False)
    splitter = SentenceSplitter(chunk_size=256, chunk_overlap=0)
    index = VectorStoreIndex.from_documents(
        documents(), transformations=[splitter, hook], embed_model=EMBED
    )
    answer = index.as_query_engine(llm=llm, similarity_top_k=4).query(QUESTION)
    return texts_of([found.node for found in answer.source_nodes])


def postprocessors(llm: CacheBlendLLM) -> Sequence[str]:
    nodes = split()[:5]
    ingest(llm, nodes)
    steps = [SimilarityPostprocessor(similarity_cutoff=0.965), LongContextReorder()]
    engine(llm, nodes, node_postprocessors=steps).query(QUESTION)
    return texts_of(nodes[:4])


def sentence_window(llm: CacheBlendLLM) -> Sequence[str]:
    nodes = SentenceWindowNodeParser(window_size=4).get_nodes_from_documents(documents())
    ingest(llm, nodes, metadata_key="window")
    chosen = nodes[8::20][:4]
    replace = MetadataReplacementPostProcessor(target_metadata_key="window")
    answer = engine(llm, chosen, node_postprocessors=[replace]).query(QUESTION)
    return texts_of([found.node for found in answer.source_nodes])


def auto_merging(llm: CacheBlendLLM) -> Sequence[str]:
    parser = HierarchicalNodeParser.from_defaults(chunk_sizes=[512, 128], chunk_overlap=0)
    nodes = parser.get_nodes_from_documents(documents())
    ingest(llm, nodes)
    storage = StorageContext.from_defaults()
    storage.docstore.add_documents(nodes)
    leaves = get_leaf_nodes(nodes)[:5]
    merging = AutoMergingRetriever(Retrieve(leaves), storage)  # type: ignore[arg-type]
    answer = RetrieverQueryEngine.from_args(merging, llm=llm).query(QUESTION)
    found = [source.node for source in answer.source_nodes]
    assert {n.node_id for n in found} - {n.node_id for n in leaves}, "nothing was merged"
    return texts_of(found)


def held_to(llm: CacheBlendLLM, answer: str) -> CacheBlendLLM:
    """The same model, which can write nothing else: so small a one would not choose by itself."""
    held = {"structured_outputs": {"choice": [answer]}}
    return CacheBlendLLM(
        engine=llm.engine, max_tokens=HELD_TOKENS, sampling={**llm.sampling, **held}
    )


def router(llm: CacheBlendLLM) -> Sequence[str]:
    nodes = split()[:4]
    ingest(llm, nodes)
    tools = [
        QueryEngineTool.from_defaults(engine(llm, part), name=name, description=name)
        for name, part in {"one": nodes[:2], "all": nodes}.items()
    ]
    selector = LLMSingleSelector.from_defaults(llm=held_to(llm, SELECTED))
    RouterQueryEngine(selector, tools, llm=llm).query(QUESTION)
    return texts_of(nodes)


def sub_question(llm: CacheBlendLLM) -> Sequence[str]:
    nodes = split()[:4]
    ingest(llm, nodes)
    tool = QueryEngineTool.from_defaults(engine(llm, nodes), name="docs", description="ferries")
    SubQuestionQueryEngine.from_defaults(
        [tool],
        llm=llm,
        question_gen=LLMQuestionGenerator.from_defaults(llm=held_to(llm, ASKED)),
        use_async=False,
        verbose=False,
    ).query(QUESTION)
    return texts_of(nodes)


def citation(mode: MetadataMode) -> Callable[[CacheBlendLLM], Sequence[str]]:
    def run(llm: CacheBlendLLM) -> Sequence[str]:
        nodes = split()[:4]
        ingest(llm, nodes, metadata_mode=mode)
        CitationQueryEngine.from_args(
            None,  # type: ignore[arg-type]
            llm=llm,
            retriever=Retrieve(nodes),
            citation_chunk_size=512,
        ).query(QUESTION)
        return texts_of(nodes, mode)

    return run


CASES: dict[str, Case] = {
    **{
        name: Case(response_mode(name))
        for name in ("compact", "refine", "tree_summarize", "accumulate", "compact_accumulate")
    },
    "streaming compact": Case(response_mode("compact", streaming=True)),
    "streaming refine": Case(response_mode("refine", streaming=True)),
    "streaming tree_summarize": Case(response_mode("tree_summarize", streaming=True)),
    "async accumulate": Case(response_mode("accumulate", use_async=True)),
    "context": Case(chat_engine(ContextChatEngine)),
    "condense_plus_context": Case(chat_engine(CondensePlusContextChatEngine)),
    "index": Case(from_index),
    "postprocessors": Case(postprocessors),
    "sentence window": Case(sentence_window, 0.98),
    "auto merging": Case(auto_merging),
    "router": Case(router, answer=SELECTED),
    "sub question": Case(sub_question, answer=ASKED),
    "citation": Case(citation(MetadataMode.LLM), 0.9),
    "citation, text alone": Case(citation(MetadataMode.NONE)),
    "simple_summarize": Case(response_mode("simple_summarize"), 0.5),
}


class Calls(BaseEventHandler):
    """Notes what LlamaIndex gives to an LLM: for each call, roles and texts.

    A completion, which for a chat model is what a user says, is noted as such.
    """

    calls: list[list[dict[str, str]]] = []  # noqa: RUF012 - a pydantic field
    tokens: list[int] = []  # noqa: RUF012 - the most that each call's answer may have

    def clear(self) -> None:
        """Forget all calls."""
        self.calls.clear()
        self.tokens.clear()

    def handle(self, event: Any, **_: Any) -> None:
        if isinstance(event, LLMChatStartEvent | LLMCompletionStartEvent):
            self.tokens.append(event.model_dict["num_output"])
        if isinstance(event, LLMChatStartEvent):
            self.calls.append(
                [{"role": m.role.value, "content": m.content} for m in event.messages]
            )
        if isinstance(event, LLMCompletionStartEvent):
            self.calls.append([{"role": "user", "content": event.prompt}])


def listen() -> Calls:
    """From now on, in this process; LlamaIndex has no way to stop it."""
    calls = Calls()
    get_dispatcher().add_event_handler(calls)
    return calls
