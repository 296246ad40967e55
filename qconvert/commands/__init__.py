"""The six commands as functions of plain arguments: what `import qconvert` and the command line
both call. Each makes the options of its stage, with the names and defaults of the command line.
"""
