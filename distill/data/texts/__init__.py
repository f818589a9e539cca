"""Texts as rows of tokens for language models: chats, prompts with completions, packed documents, batches by length."""
