"""Other people's weights: which keys mean what, how files are opened, and how towers are filled.

A run that begins asks ``starting_weights``: a checkpoint's come from ``stored``, other people's through ``load``, which
opens ``files``, reads ``origin`` and takes ``names`` by ``match``; what nobody has is drawn (``models.initial``), and
``engine.placing`` brings each parameter to where the engine wants it. The other way, ``export`` writes what ``express``
can say in other tools' words.
"""
