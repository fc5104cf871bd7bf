"""The router process: the OpenAI API, tokenisation, placement and retries."""
