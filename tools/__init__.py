"""Programs around the seven files, each started by `python -m tools.NAME`: they import the seven
and are imported by none.

    text and conversations      prepare, train_tokenizer, chat_blend, tiny_documents
    before anything runs        plan
    measuring and showing       answer, ruler, perplexity, needle_pairs, plot, chat
    the paper's claims          experiment, report

and, no programs, what they know of other people's data: records (files, and the documents in them),
conversations (chat records), questions (benchmarks' records, and how an answer is scored); and what
two programs use: variants (the runs of experiments) and pictures (what plot draws for a lecture).
"""
