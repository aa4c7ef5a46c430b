"""What `import spas_sage_attn` finds in processes that a program under `python -m tamis.compat` starts.

That command puts the folder above on `PYTHONPATH`, behind everything else. Importing this puts `tamis.compat` in its
own place; where the authors' package is installed, it is an error, as in the program itself.
"""

import sys

from tamis.compat.alias import PACKAGE, install

if __name__ == PACKAGE:
    del sys.modules[__name__]
    install()
