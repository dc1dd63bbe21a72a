# Control generation parameters
generated_ids = model.generate(
    **inputs,
    max_new_tokens=100,
    min_length=20,
    num_beams=5, # Beam search
    no_repeat_ngram_size=2, # Avoid repetition
    top_p=0.9, # Nucleus sampling
    temperature=0.7, # Creativity
    do_sample=True, # Enable sampling
)
# For deterministic output
generated_ids = model.generate(
    **inputs,
    max_new_tokens=50,
    num_beams=5,
    do_sample=False,
)
