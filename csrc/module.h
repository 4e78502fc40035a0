// The Python module of an extension: empty, since operators register themselves when the library is loaded.
#pragma once
#include <Python.h>

#define RKL_CONCAT_(a, b) a##b
#define RKL_CONCAT(a, b) RKL_CONCAT_(a, b)
#define RKL_STRING_(a) #a
#define RKL_STRING(a) RKL_STRING_(a)

#define RKL_PYTHON_MODULE(name)                                                                             \
  PyMODINIT_FUNC RKL_CONCAT(PyInit_, name)() {                                                              \
    static PyModuleDef definition = {                                                                       \
        PyModuleDef_HEAD_INIT, RKL_STRING(name), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&definition);                                                                    \
  }
