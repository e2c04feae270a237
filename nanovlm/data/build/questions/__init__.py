"""Questions and answers that a model writes about the pictures of a source.

```
record --template--> prompt --writer--> reply --strict JSON, schema--> items --rules--> --asked again--> records
 recipe.py            kinds.py  writers.py       reply.py                     rules.py     checks.py      output.py
```

Whatever is lost on the way is counted with its reason (write.py). What a record or a model says is data: it is never a
template, a program or an order, and what looks like one is left out.
"""
