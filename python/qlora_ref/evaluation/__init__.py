"""Judge models as the QLoRA paper did (section 5 and 6), from ratings that already exist or from new ones.

    relative     scores relative to ChatGPT, both presentation orders, intervals (Table 6)
    tournament   matches out of pairwise, Open Assistant and human ratings; order bias
    elo          the Elo update, replay, and the mean over random orderings (Tables 1 and 7)
    bradley_terry  the same matches without an ordering, with intervals that respect the questions
    agreement    Kendall, Spearman, Fleiss: judges against judges, annotators against annotators
    judge_*      asking an endpoint, parsing what it says, a ledger that survives a kill
    generate     the answers to be judged
    mmlu*        5-shot and 0-shot MMLU by the logits of the four letters
    perplexity   of a text file
    report_*     tables, plots, and one static HTML page to read

Nothing here imports the quantization core: the ratings are data, and a model is whatever transformers loads.
"""
