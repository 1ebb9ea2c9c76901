// What the host side (conv_rows.cpp) and the kernels (conv_rows.h, conv_rows_wgrad.h) of the row-class convolution tell
// each other. Torch-free, no instruction set, raw pointers only: the host owns the arrays.
#pragma once

#include <cstdint>

#include "../../params.h"
#include "../types.h"

namespace fastconv::cpu {

// A run of consecutive 32-bit units (one fp32 channel, or two bf16 channels) that a row and the packed weights share.
struct RowsSegment {
  int64_t panel;  // first unit in the packed panel
  int64_t units;
  int32_t r, s;  // the tap that the run starts at
};

// Output positions with the same live taps: all pairs of h[0..nh) and w[0..nw), in every image.
struct RowsClass {
  const int32_t *h, *w;
  int64_t nh, nw;
};

constexpr int64_t kTileUnits = 16;  // of a tile register's row

// Sixteen rows of one segment as tile registers load them (gemm_tile_amx.h): row i of the units [16 u, 16 u + 16) lies
// at base + i * step + u * next.
struct RowsSource {
  const char* base;
  int64_t step, next;
};

// Rows that are cut into tiles together: one class, or several small ones (then dead taps of a row read zeros).
struct RowsGroup {
  const RowsClass* classes;
  const RowsSegment* segments;
  int32_t n_classes, n_segments;
  int64_t rows;    // of all images
  int64_t run;     // a grain ends with so many rows, an image row of the class; 0: grains go on over image rows
  int64_t grains;  // the rows that one tile register holds (else single rows)
  int64_t tiles;   // grains are spread evenly over them
};

struct RowsPlan {
  const RowsGroup* groups;
  int64_t n_groups, n_images;
  int64_t taps_r, taps_s;
  // Byte offsets of the input row (h_offset[oh * taps_r + r]) and column (w_offset[ow * taps_s + s]) that a tap reads;
  // -1: dead.
  const int64_t *h_offset, *w_offset;
  int64_t image_bytes;  // of the input
  int64_t out_h, out_w;
  int64_t reduce, columns;  // channels that are summed over; channels that come out
  int64_t tap_units;        // units of one tap
  int64_t panel_bytes;
  const uint8_t* tap_live;  // [taps_r * taps_s]: some row reads it
  // Few channels: the one segment of a row is gathered from `gather_r` pieces of the input, `gather_step` bytes apart
  // (0: it is not).
  int64_t gather_r, gather_bytes, gather_step;
};

template <class T>
struct RowsEpilogue {  // y = act((acc - mean) * scale + shift + residual); any pointer but out may be null
  T* out;
  T* pre;  // the value before act
  const T* residual;
  const float* scale;
  const float* shift;
  Act act;
  const float* mean = nullptr;
};

// One thread's share of a forward or data-gradient convolution. W: T, or float where T is bf16.
template <class T, class W>
struct RowsTask {
  const RowsPlan* plan;
  const T* input;
  const W* weight;     // [k][r][s][c]
  const char* packed;  // all panels, where the caller has packed them; null: `weight` is packed on the way
  bool transposed;     // data gradient: sum over k, columns c
  RowsEpilogue<T> epilogue;
  int64_t panel_begin, panel_end;
  int64_t tile_begin, tile_end;
  // Workspace, of this thread.
  char* panels;
  int64_t panels_at_once;
  const char** table;  // [tiles_at_once][max segments][tile rows]
  int64_t table_tile;  // entries of one tile
  int64_t tiles_at_once;
  const char* input_end;
  const char* zeros;  // tap_units zero units
  char* gathered;     // [tiles_at_once][tile rows][gather_row(tap_units)]
  float* sums;        // conv_rows_dots() only: [tiles][tile rows][tile columns]
  // With tile registers only: `table` is of one tile.
  RowsSource* sources;   // [tiles_at_once][max segments][2]
  int64_t sources_tile;  // entries of one tile
  char* staged;          // [tiles_at_once], rows that do not lie evenly
  int64_t staged_tile;   // bytes of one tile
};

// One thread's share of a weight gradient: dw[k0..k1)[tap_begin..tap_end)[c0..c1).
template <class T, class D>
struct WgradTask {
  const T* dz;  // [n][p][q][k]
  const T* x;   // pixel (n, h, w) at ((n * h_size + h) * w_size + w) * pixel, `columns` elements from there
  D* dw;        // [k][tap][columns]
  int64_t n, p, q, k;
  int64_t h_size, w_size, pixel, columns;
  int64_t taps_r, taps_s;
  int64_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int64_t k0, k1, c0, c1, tap_begin, tap_end;
  int64_t taps_at_once;  // at most kWgradTaps
  bool past;             // dw (fp32, 64-byte aligned, columns a multiple of 16) is written past the caches
  bool leave_dead;       // taps that read no input stay unwritten instead of zero
  int64_t gather_r;      // > 0: taps are gathered; `columns` / gather_r elements from each of gather_r input rows,
  int64_t gather_step;   // gather_step elements apart, into rows of gather_row elements, whole tiles of columns
  int64_t gather_row;
  // Workspace, of this thread.
  char* a;         // kWgradRowBytes: blocks of [units][tile rows]
  char* b;         // kWgradColumnBytes: blocks of [units][tile columns]
  float* sum;      // [taps_at_once][kWgradK][c1 - c0], where D is narrower than fp32
  const T** rows;  // 2 * kWgradUnits * (4 / sizeof(T)) pointers
  T* gathered;     // [kWgradUnits * (4 / sizeof(T))][gather_row] and 64 bytes
};

constexpr int64_t kInPlaceTiles = 2;  // up to so many tiles of rows, the forward pass reads the weights where they lie

constexpr int kFewRows = 16;        // up to so many pairs of a tap, the gradients read the weights where they lie,
constexpr int kFewFilters = 4;      // so many filters at a time, of which there are a multiple,
constexpr int64_t kFewAhead = 8;    // and ask for the lines of those so much further on
constexpr int64_t kFewBlock = 128;  // vectors of all pairs that stay in L1, of x and of dx: 16 KB

// The output rows z[i] and the input rows x[i] that a tap joins.
struct FewRowsTap {
  int64_t offset;     // elements into a filter
  int pairs, padded;  // padded: to 4, 8 or kFewRows
  int64_t first;      // the padded pairs of the taps before
  int32_t z[kFewRows], x[kFewRows];
};

// One thread's share of the gradients of a convolution on a few rows. W: T, or float where T is bf16.
template <class T, class W>
struct FewRowsTask {
  const T* dz;      // [output rows][filters]
  const T* x;       // [rows][columns]; null where no step is taken
  const W* weight;  // [filters][filter], `filter` elements each: [tap][columns]
  int64_t filters, filter, columns, rows;
  const FewRowsTap* taps;               // live ones, and with a step those that are not but shall be stepped
  int64_t n_taps, pairs;                // padded
  RowsEpilogue<T> epilogue;             // of dx
  const int64_t* at;                    // [rows]: the row's first element in dx
  int64_t parts, part_begin, part_end;  // of the filters
  int64_t panel_begin, panel_end;       // of the columns, when the parts are added up
  float* dx_pairs;                      // all threads': by part and tap [vectors of columns][padded][lanes]
  // Workspace, of this thread.
  uint32_t* dz_pairs;  // twice [filters of a part][padded]
  float* x_pairs;      // by tap [vectors of columns][padded][lanes]
  float* sums;         // [rows][a panel's columns]
};

// Bytes of a gathered row: copies run up to 63 bytes over its end.
constexpr int64_t gather_row_bytes(int64_t units) { return (units * 4 + 63) / 64 * 64 + 64; }

constexpr int64_t kWgradUnits =
    128;  // a row block of A is 8 KB and stays in L1 while it meets a few column blocks of B (32 KB each, from L2)
constexpr int64_t kWgradK = 240;     // rows of A at once: 240 KB of L2; a multiple of 8 and of 6, the tile's rows
constexpr int64_t kWgradKAmx = 256;  // with tile registers: of 32
constexpr int64_t kWgradColumnBytes = 136 << 10;  // columns of B at once: 4 blocks of 256 units, or 128 of 8
constexpr int64_t kWgradDirect =
    320;  // fp32 with fewer rows + columns is read where it lies: packing costs more than the longer strides
constexpr int64_t kWgradTaps = 64;
constexpr int64_t kWgradRowBytes = kWgradKAmx * kWgradUnits * 4 + 64 * kWgradKAmx;

}  // namespace fastconv::cpu
