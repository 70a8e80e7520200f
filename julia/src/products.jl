# Products of matrices in compiled functions: small ones by loops over registers, large ones by BLAS.

"Numbers at an address, without a length: generated code knows how many there are."
struct Numbers{T}
    address::Ptr{T}
end
Base.@propagate_inbounds Base.getindex(a::Numbers, i::Int) = unsafe_load(a.address, i)
Base.@propagate_inbounds Base.setindex!(a::Numbers, x, i::Int) = unsafe_store!(a.address, x, i)
Base.:+(a::Numbers{T}, i::Int) where {T} = Numbers{T}(a.address + i * sizeof(T))

"The element at an index; 0 is the index of a zero."
Base.@propagate_inbounds pick(a::Numbers{T}, i::Int) where {T} = i == 0 ? zero(T) : a[i]

# Vectors of 32 bytes, in the form that LLVM has them in: they are the registers of AVX, and two of those of SSE or NEON.
const Lanes{N, T} = NTuple{N, VecElement{T}}
lanes(::Type{Float64}) = 4
lanes(::Type{Float32}) = 8
vector(::Type{T}) where {T} = Lanes{lanes(T), T}

for (T, name) in ((Float64, "v4f64"), (Float32, "v8f32"))
    V = vector(T)
    @eval @inline fused(x::$V, y::$V, z::$V) = ccall($("llvm.fmuladd.$name"), llvmcall, $V, ($V, $V, $V), x, y, z)
end
@inline spread(x::T) where {T} = ntuple(_ -> VecElement(x), Val(lanes(T)))
@inline load(a::Numbers{T}, i) where {T} = unsafe_load(Ptr{vector(T)}(a.address + i * sizeof(T)))
@inline store!(a::Numbers{T}, i, x) where {T} = unsafe_store!(Ptr{vector(T)}(a.address + i * sizeof(T)), x)

# A step of 1 as a type of its own: code for it has no other in it.
struct One end
Base.:*(i::Int, ::One) = i
Base.:*(::One, i::Int) = i

"A vector of every `step`-th number from place `i` on (from 0)."
@inline load(a::Numbers, i, ::One) = load(a, i)
@inline function load(a::Numbers{T}, i, step::Int) where {T}
    step == 0 && return spread(a[1 + i])
    return ntuple(l -> VecElement(a[1 + i + (l - 1) * step]), Val(lanes(T)))
end
@inline store!(a::Numbers, i, ::One, x) = store!(a, i, x)
@inline function store!(a::Numbers{T}, i, step::Int, x) where {T}
    for l in 1:lanes(T)
        a[1 + i + (l - 1) * step] = x[l].value
    end
    return nothing
end

"Numbers that a product is added to, with the steps from row to row and column to column; `nothing` for zeros."
struct Start{T, C}
    numbers::Numbers{T}
    rows::Int
    columns::C  # One() or an Int
end
@inline at(s::Start, i, j) = Start(s.numbers + (i * s.rows + j * s.columns), s.rows, s.columns)
@inline at(::Nothing, i, j) = nothing
@inline first_vector(s::Start{T}, ::Type{T}, i, j) where {T} = load(s.numbers, i * s.rows + j * s.columns, s.columns)
@inline first_vector(::Nothing, ::Type{T}, i, j) where {T} = spread(zero(T))
@inline first_number(s::Start{T}, ::Type{T}, i, j) where {T} = s.numbers[1 + i * s.rows + j * s.columns]
@inline first_number(::Nothing, ::Type{T}, i, j) where {T} = zero(T)

"""
    block!(Val(R), Val(C), last, out, o1, o2, k, a, a1, a2, b, b1, start)

A block of R rows and C vectors of columns of a product, whose sums stay in registers; `b` lies in rows. The vectors lie
side by side, but the last one begins at column `last`. All that the product is added to is read before anything is
written, so that `out` may be there, and the last vector may take columns again.
"""
@generated function block!(
        ::Val{R}, ::Val{C}, last, out::Numbers{T}, o1, o2, k, a::Numbers{T}, a1, a2, b::Numbers{T}, b1, start
    ) where {R, C, T}
    n = lanes(T)
    sums = [Symbol(:sum_, r, :_, c) for r in 1:R, c in 1:C]
    rows = [Symbol(:row_, c) for c in 1:C]
    columns = [c == C > 1 ? :last : (c - 1) * n for c in 1:C]
    begins = [:($(sums[r, c]) = first_vector(start, T, $(r - 1), $(columns[c]))) for c in 1:C for r in 1:R]
    loads = [:($(rows[c]) = load(b, l * b1 + $(columns[c]))) for c in 1:C]
    steps = [
        quote
            x = spread(a[1 + $(r - 1) * a1 + l * a2])
            $([:($(sums[r, c]) = fused(x, $(rows[c]), $(sums[r, c]))) for c in 1:C]...)
        end for r in 1:R
    ]
    ends = [:(store!(out, $(r - 1) * o1 + $(columns[c]) * o2, o2, $(sums[r, c]))) for c in 1:C for r in 1:R]
    return quote
        $(Expr(:meta, :inline))
        $(begins...)
        for l in 0:(k - 1)
            $(loads...)
            $(steps...)
        end
        $(ends...)
        return nothing
    end
end

"""
R rows of a product, of `n` columns, by blocks of at most C > 1 vectors, and of about as many each, so that none waits for
its own sums; the larger ones come last, with the vector that takes columns again.
"""
@generated function strip!(
        ::Val{R}, ::Val{C}, out::Numbers{T}, o1, o2, n, k, a, a1, a2, b, b1, start
    ) where {R, C, T}
    width = lanes(T)
    block(c) = :(block!(
        Val(R), Val($c), min($((c - 1) * width), n - j - $width), out + j * o2, o1, o2, k, a, a1, a2, b + j, b1,
        at(start, 0, j)
    ))
    one_of(c) = c == C ? block(c) : Expr(:if, :(vectors == $c), block(c), one_of(c + 1))
    return quote
        $(Expr(:meta, :inline))
        j, rest = 0, cld(n, $width)
        for blocks in cld(rest, $C):-1:1
            vectors = div(rest, blocks)
            $(one_of(1))
            j += vectors * $width
            rest -= vectors
        end
        return nothing
    end
end

# Vectors of columns beside four rows: so many sums fit into the registers, of which AVX-512 has twice as many as AVX.
const BESIDE_FOUR = let CPUID = Base.BinaryPlatforms.CPUID
    isdefined(CPUID, :JL_X86_avx512f) && CPUID.test_cpu_feature(CPUID.JL_X86_avx512f) ? 4 : 3
end

"The product by rows of `b`: sums of multiples of them. There are at least as many columns as a vector has numbers."
@noinline function by_rows!(out::Numbers{T}, o1, o2, m, n, k, a, a1, a2, b, b1, start) where {T}
    i = 0
    while i + 4 <= m
        strip!(Val(4), Val(BESIDE_FOUR), out + i * o1, o1, o2, n, k, a + i * a1, a1, a2, b, b1, at(start, i, 0))
        i += 4
    end
    if i + 2 <= m
        strip!(Val(2), Val(4), out + i * o1, o1, o2, n, k, a + i * a1, a1, a2, b, b1, at(start, i, 0))
        i += 2
    end
    if i < m
        strip!(Val(1), Val(8), out + i * o1, o1, o2, n, k, a + i * a1, a1, a2, b, b1, at(start, i, 0))
    end
    return nothing
end

@inline total_of(x::NTuple{4}) = (x[1].value + x[3].value) + (x[2].value + x[4].value)
@inline function total_of(x::NTuple{8})
    a, b = x[1].value + x[5].value, x[2].value + x[6].value
    c, d = x[3].value + x[7].value, x[4].value + x[8].value
    return (a + c) + (b + d)
end

"R rows of a product by inner products, one column after the other, of which the sums stay in registers."
@generated function inner!(
        ::Val{R}, out::Numbers{T}, o1, o2, n, k, a::Numbers{T}, a1, b::Numbers{T}, b2, start
    ) where {R, T}
    sums, totals = [Symbol(:sum_, r) for r in 1:R], [Symbol(:total_, r) for r in 1:R]
    return quote
        $(Expr(:meta, :inline))
        whole = k - k % $(lanes(T))
        for j in 0:(n - 1)
            y = b + j * b2
            $([:($sum = spread(zero(T))) for sum in sums]...)
            for l in 0:$(lanes(T)):(whole - 1)
                z = load(y, l)
                $([:($(sums[r]) = fused(load(a, $(r - 1) * a1 + l), z, $(sums[r]))) for r in 1:R]...)
            end
            $([:($(totals[r]) = first_number(start, T, $(r - 1), j) + total_of($(sums[r]))) for r in 1:R]...)
            for l in (whole + 1):k
                z = y[l]
                $([:($(totals[r]) = muladd(a[$(r - 1) * a1 + l], z, $(totals[r]))) for r in 1:R]...)
            end
            $([:(out[1 + $(r - 1) * o1 + j * o2] = $(totals[r])) for r in 1:R]...)
        end
        return nothing
    end
end

"The product by inner products of the rows of `a`, which lie in rows, and the columns of `b`, which lie in columns."
@noinline function by_columns!(out, o1, o2, m, n, k, a, a1, b, b2, start)
    i = 0
    while i + 4 <= m
        inner!(Val(4), out + i * o1, o1, o2, n, k, a + i * a1, a1, b, b2, at(start, i, 0))
        i += 4
    end
    while i < m
        inner!(Val(1), out + i * o1, o1, o2, n, k, a + i * a1, a1, b, b2, at(start, i, 0))
        i += 1
    end
    return nothing
end

"The product in any other case: it is small, or nothing in it lies in rows."
@noinline function plainly!(out::Numbers{T}, o1, o2, m, n, k, a, a1, a2, b, b1, b2, start) where {T}
    for i in 0:(m - 1), j in 0:(n - 1)
        total = first_number(start, T, i, j)
        for l in 0:(k - 1)
            total = muladd(a[1 + i * a1 + l * a2], b[1 + l * b1 + j * b2], total)
        end
        out[1 + i * o1 + j * o2] = total
    end
    return nothing
end

# Beyond this many products BLAS is faster.
const FEW = 1 << 20

"""
    multiply!(out, m, n, k, a, a1, a2, b, b1, b2, start)

The product of matrices (m, k) and (k, n), added to `start`, to `out`, (m, n) in row-major order. `a1` is the step in
memory from row to row of `a`, `a2` that from column to column, and so for `b`. One of each pair is 1 where the product
is large. `start` may be where `out` is.
"""
@inline function multiply!(out::Numbers{T}, m, n, k, a, a1, a2, b, b1, b2, start) where {T}
    return if m * n * k > FEW
        multiply_many!(out, m, n, k, a, a1, a2, b, b1, b2, start)
    elseif n >= lanes(T) && b2 == 1
        by_rows!(out, n, One(), m, n, k, a, a1, a2, b, b1, start)
    elseif m >= lanes(T) && a1 == 1
        by_rows!(out, 1, n, n, m, k, b, b2, b1, a, a2, transposed(start))
    elseif k >= lanes(T) && a2 == 1 && b1 == 1
        by_columns!(out, n, One(), m, n, k, a, a1, b, b2, start)
    else
        plainly!(out, n, One(), m, n, k, a, a1, a2, b, b1, b2, start)
    end
end
@inline transposed(s::Start) = Start(s.numbers, 1 * s.columns, s.rows)
@inline transposed(::Nothing) = nothing

# Products of few numbers, of which the sizes are known where code is made: loops of a known length, or none.

# Up to so many products of numbers; of inner products, whose code has no loops, up to so many.
const SMALL, SMALL_INNER = 1 << 12, 1 << 8

@inline plus(x::Lanes{N}, y::Lanes{N}) where {N} = ntuple(i -> VecElement(x[i].value + y[i].value), Val(N))
@inline times(x::Lanes{N}, y::Lanes{N}) where {N} = ntuple(i -> VecElement(x[i].value * y[i].value), Val(N))
sum_of(terms) = reduce((x, y) -> :(plus($x, $y)), terms)

# Sums of a block that fit into the registers beside a row, how many chains the sum over k is cut into where a block is
# small (each waits for the last product of its own alone), and products up to which a block has no loop.
const SUMS, CHAINS, UNROLLED = 8, 4, 96

"""
A block of a product by rows of `b`, as code: `rows` rows from `i` on, and vectors of columns from `columns` on. All that
it is added to is read before anything is written: `out` may be there, and the last vector may take columns again.
"""
function small_block(rows, columns, k, chains, (o1, o2), (a1, a2), b1)
    rows = 0:(rows - 1)
    sums(r, j, c) = Symbol(:sum_, r, :_, j, :_, c)
    function products(l, c)  # number l of the sum over k, to chain c
        terms = Any[:($(Symbol(:x_, r)) = spread(a[1 + (i + $r) * $a1 + $l * $a2])) for r in rows]
        for j in columns
            push!(terms, :(row = load(b, $l * $b1 + $j)))
            append!(terms, [:($(sums(r, j, c)) = fused($(Symbol(:x_, r)), row, $(sums(r, j, c)))) for r in rows])
        end
        return terms
    end
    code = Any[:($(sums(r, j, 0)) = first_vector(begins, T, i + $r, $j)) for r in rows, j in columns][:]
    append!(code, [:($(sums(r, j, c)) = spread(zero(T))) for r in rows, j in columns, c in 1:(chains - 1)])
    whole = k * length(columns) * length(rows) <= UNROLLED ? 0 : k - k % chains
    if whole > 0
        steps = reduce(vcat, [products(:(l + $c), c) for c in 0:(chains - 1)])
        push!(code, :(for l in 0:($chains):$(whole - 1)
            $(steps...)
        end))
    end
    for l in whole:(k - 1)
        append!(code, products(l, l % chains))
    end
    append!(code, [:($(sums(r, j, 0)) = $(sum_of([sums(r, j, c) for c in 0:(chains - 1)]))) for r in rows, j in columns])
    to(r, j) = o2 == 1 ? :(store!(out + (i + $r) * $o1, $j, $(sums(r, j, 0)))) :
        :(store!(out + ((i + $r) * $o1 + $j * $o2), 0, $o2, $(sums(r, j, 0))))
    append!(code, [to(r, j) for r in rows, j in columns])
    return code
end

"The product by rows of `b`, as code. There are at least as many columns as a vector has numbers."
function small_by_rows(lanes, m, n, k, o, a, b1, start)
    columns = collect(0:lanes:(n - lanes))
    n % lanes == 0 || push!(columns, n - lanes)
    # Of about the same width, so that vectors that overlap are in one block.
    blocks = collect(Iterators.partition(columns, cld(length(columns), cld(length(columns), SUMS))))
    wide = maximum(length, blocks)
    chains = clamp(SUMS ÷ wide, 1, min(k, CHAINS))
    rows = clamp(SUMS ÷ (wide * chains), 1, m)
    strip(rows) = reduce(vcat, [small_block(rows, part, k, chains, o, a, b1) for part in blocks])
    whole, rest = m - m % rows, m % rows
    code = Any[:(begins = $start), :(for i in 0:($rows):$(whole - 1)
        $(strip(rows)...)
    end)]
    rest > 0 && push!(code, :(let i = $whole
        $(strip(rest)...)
    end))
    return Expr(:block, code...)
end

"The product by inner products, as code."
function small_by_columns(lanes, m, n, k, a1, b2)
    whole, code = k - k % lanes, Any[]
    chains = min(whole ÷ lanes, CHAINS)
    sums = [Symbol(:sum_, c) for c in 1:chains]
    for i in 0:(m - 1), j in 0:(n - 1)
        for (count, l) in enumerate(0:lanes:(whole - 1))
            x, y, sum = :(load(a, $(i * a1 + l))), :(load(b, $(l + j * b2))), sums[mod1(count, chains)]
            push!(code, count <= chains ? :($sum = times($x, $y)) : :($sum = fused($x, $y, $sum)))
        end
        push!(code, :(total = first_number(start, T, $i, $j) + total_of($(sum_of(sums)))))
        append!(code, [:(total = muladd(a[$(1 + i * a1 + l)], b[$(1 + l + j * b2)], total)) for l in whole:(k - 1)])
        push!(code, :(out[$(1 + i * n + j)] = total))
    end
    return Expr(:block, code...)
end

"The product in any other case, as code."
function small_plainly(m, n, k, a1, a2, b1, b2)
    return quote
        for i in 0:$(m - 1), j in 0:$(n - 1)
            total = first_number(start, T, i, j)
            for l in 0:$(k - 1)
                total = muladd(a[1 + i * $a1 + l * $a2], b[1 + l * $b1 + j * $b2], total)
            end
            out[1 + i * $n + j] = total
        end
    end
end

"""
    small!(out, Val((m, n, k)), a, Val((a1, a2)), b, Val((b1, b2)), start)

The same as [`multiply!`](@ref), in code for these sizes and steps alone where the product is small.
"""
@generated function small!(
        out::Numbers{T}, ::Val{sizes}, a::Numbers{T}, ::Val{as}, b::Numbers{T}, ::Val{bs}, start
    ) where {T, sizes, as, bs}
    (m, n, k), (a1, a2), (b1, b2), l = sizes, as, bs, lanes(T)
    body = if k == 0 || m * n * k > SMALL
        nothing
    elseif n >= l && b2 == 1
        small_by_rows(l, m, n, k, (n, 1), (a1, a2), b1, :start)
    elseif m >= l && a1 == 1
        :((a, b) = (b, a); $(small_by_rows(l, n, m, k, (1, n), (b2, b1), a2, :(transposed(start)))))
    elseif k >= l && a2 == 1 && b1 == 1 && m * n * k <= SMALL_INNER
        small_by_columns(l, m, n, k, a1, b2)
    elseif m * n * k <= SMALL_INNER
        small_plainly(m, n, k, a1, a2, b1, b2)
    end
    body === nothing && return quote
        $(Expr(:meta, :inline))
        multiply!(out, $m, $n, $k, a, $a1, $a2, b, $b1, $b2, start)
    end
    return quote
        $(Expr(:meta, :inline))
        @inbounds $body
        return nothing
    end
end

"Of another BLAS, with integers of 32 bits: dgemm, dgemv, sgemm, sgemv; null for Julia's own."
const BORROWED = fill(C_NULL, 4)

"""
    borrow_blas(dgemm, dgemv, sgemm, sgemv)

Multiply matrices in compiled functions by the Fortran functions at these addresses. Those of the library that a field
was written with take as long there as here, round alike, and run on the threads that it was given.
"""
borrow_blas(addresses::Integer...) = (BORROWED .= pointer_to.(addresses); nothing)

@noinline function multiply_many!(out::Numbers{T}, m, n, k, a, a1, a2, b, b1, b2, start) where {T}
    if start !== nothing
        for i in 0:(m - 1), j in 0:(n - 1)
            out[1 + i * n + j] = first_number(start, T, i, j)
        end
    end
    add = start !== nothing
    return if BORROWED[1] == C_NULL
        multiply_own!(out, m, n, k, a, a1, a2, b, b1, b2, add)
    else
        multiply_borrowed!(out, m, n, k, a, a1, a2, b, b1, b2, add)
    end
end

for (T, k, gemm, gemv) in ((Float64, 1, :dgemm_, :dgemv_), (Float32, 3, :sgemm_, :sgemv_))
    own(name) = :((BLAS.@blasfunc($name), BLAS.libblastrampoline))
    for (multiply, I, gemm, gemv) in (
            (:multiply_own!, BLAS.BlasInt, own(gemm), own(gemv)),
            (:multiply_borrowed!, Int32, :(BORROWED[$k]), :(BORROWED[$(k + 1)])),
        )
        @eval begin
            # BLAS's matrices are column-major: what lies here in rows is to it the transpose.
            function $multiply(out::Numbers{$T}, m, n, k, a, a1, a2, b, b1, b2, add)
                beta = add ? one($T) : zero($T)
                if m == 1 || n == 1
                    # (rows, k) times a vector
                    x, x1, rows, s1, s2, step = m == 1 ? (b, a, n, b2, b1, a2) : (a, b, m, a1, a2, b1)
                    trans, r, c, ld = s2 == 1 ? ('T', k, rows, s1) : ('N', rows, k, s2)
                    ccall(
                        $gemv, Cvoid,
                        (
                            Ref{UInt8}, Ref{$I}, Ref{$I}, Ref{$T}, Ptr{$T}, Ref{$I}, Ptr{$T}, Ref{$I}, Ref{$T}, Ptr{$T},
                            Ref{$I}, Clong,
                        ),
                        trans, r, c, one($T), x.address, ld, x1.address, step, beta, out.address, 1, 1
                    )
                else
                    transposed_b, ld_b = b2 == 1 ? ('N', b1) : ('T', b2)
                    transposed_a, ld_a = a2 == 1 ? ('N', a1) : ('T', a2)
                    ccall(
                        $gemm, Cvoid,
                        (
                            Ref{UInt8}, Ref{UInt8}, Ref{$I}, Ref{$I}, Ref{$I}, Ref{$T}, Ptr{$T}, Ref{$I}, Ptr{$T}, Ref{$I},
                            Ref{$T}, Ptr{$T}, Ref{$I}, Clong, Clong,
                        ),
                        transposed_b, transposed_a, n, m, k, one($T), b.address, ld_b, a.address, ld_a, beta, out.address,
                        n, 1, 1
                    )
                end
                return nothing
            end
        end
    end
end

"""
A matrix that compiled functions read by columns where it lies in rows: they find the transpose of it, in rows, among
their constants. Layout as in C.

  - `trained`: 1 where it is one of the parameters, 0 where it is one of the constants; there from place `from` on, with
    `step` from row to row. `to`: the place of the transpose.
"""
struct Layer
    trained::Int64
    from::Int64
    rows::Int64
    columns::Int64
    step::Int64
    to::Int64
end

function transpose!(to::Numbers, from::Numbers, rows, columns, step)
    for i in 0:8:(rows - 1), j in 0:(columns - 1)  # by parts, of which the lines stay in the cache
        for l in i:min(i + 7, rows - 1)
            to[1 + j * rows + l] = from[1 + l * step + j]
        end
    end
    return nothing
end
