"""Talks to a running server with OpenAI's own client (pip install openai).

llama-pte serve tiny.pte --chat-template llama2
python examples/openai_client.py http://127.0.0.1:8000
"""

import sys

from openai import OpenAI


def main(url: str) -> None:
    """Prints a completion, and then a chat's answer as it is generated."""
    client = OpenAI(base_url=f"{url}/v1", api_key="unused")
    model = client.models.list().data[0].id

    completion = client.completions.create(model=model, prompt="Once upon a time", max_tokens=30, temperature=0)
    print(completion.choices[0].text)

    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me about a dog."}],
        max_completion_tokens=30,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
