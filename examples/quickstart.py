"""CacheBlend over three short texts: their KV is computed once, then blended into the prompt."""

from cacheblend_rag import BlendConfig, CacheBlend
from cacheblend_rag.models import embedded_model

SYSTEM = "You answer questions using only the passages you are given. Reply with a short answer."
TEXTS = [
    "The lighthouse of Skarn was built in 1874 by Maren Oldby. Its lamp burns rape oil and can be "
    "seen for nineteen miles. Two keepers live there, and a goat that is called Admiral.",
    "The ferry to Skarn leaves the town quay at eight in the morning and at four in the afternoon. "
    "A ticket costs six crowns; children under ten and dogs on a lead travel free of charge.",
    "On the first Sunday of June the islanders race their rowing boats around the lighthouse. The "
    "winner of the race gets a smoked salmon and rings the harbour bell at sunset.",
]
QUESTION = "What is the goat called?"


def main() -> None:
    config = BlendConfig(system_prompt=SYSTEM)  # as in the prompts below
    with CacheBlend(embedded_model(), config=config, block_size=32) as blend:
        blend.ingest(TEXTS)
        context = "\n\n".join(TEXTS)
        prompt = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"Passages:\n\n{context}\n\nQuestion: {QUESTION}"},
        ]
        with blend.stream(prompt, max_tokens=24, temperature=0.0) as answer:
            for piece in answer:
                print(piece, end="", flush=True)
        report = answer.result.report
        print(f"\n\n{report.tokens_reused} of {report.tokens_total} prompt tokens were reused,")
        print(f"{report.tokens_recomputed} recomputed; first token after {report.ttft_s:.2f} s.")
        for segment in report.segments:
            print(f"  {segment.start:4} to {segment.end:4}  {segment.kind}: {segment.detail}")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
