"""Programs around the seven files, each started by `python -m tools.NAME`: they import the seven
and are imported by none.

    text and conversations      prepare, train_tokenizer, chat_blend, tiny_documents
    before anything runs        plan
    measuring and showing       answer (its records and scores: questions), ruler, perplexity,
                                plot, chat
"""
