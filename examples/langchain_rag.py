"""A LangChain chain over documents: FAISS, MiniLM and a model of your choice."""

import argparse
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from cacheblend_rag.models import embedded_model
from cacheblend_rag.retrieval import Retriever, load_documents, split
from langchain_cacheblend import CacheBlendIngestion, ChatCacheBlend

DATA = Path(__file__).parent / "data"
PROMPT = ChatPromptTemplate.from_template("{context}\n\nQuestion: {question}\nAnswer briefly.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub name or folder; SmolLM2-135M by default")
    parser.add_argument("question", nargs="?", default="When does the last ferry leave?")
    args = parser.parse_args()

    with ChatCacheBlend(args.model or embedded_model(), max_tokens=48) as llm:
        passages = split(load_documents([DATA]).documents, 256, llm.blend.tokenizer)
        CacheBlendIngestion(llm).transform_documents([Document(p.text) for p in passages])

        search = Retriever(passages).search
        context = RunnableLambda(lambda asked: "\n\n".join(p.text for p in search(asked, 4)))
        chain = {"context": context, "question": RunnablePassthrough()} | PROMPT | llm
        for piece in (chain | StrOutputParser()).stream(args.question):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
