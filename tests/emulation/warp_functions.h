// Kernels of one warp that call one function each: (a, b, result) of device memory, for test_warp_functions.py.
#pragma once
#include <map>
#include <string>

std::map<std::string, void (*)(const void*, const void*, void*)> warp_function_tests();
