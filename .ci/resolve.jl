# Whether the bounds of julia/Project.toml and pyjlode/juliapkg.json resolve: Pkg's resolver, with a registry of one
# version for each package, the one in use.
#
#     julia .ci/resolve.jl FOLDER    # of the project in use, which has a Manifest.toml
#
# Prints the number of packages that were resolved. Packages whose bounds on each other are not met by what is in use
# (an older version was put there by hand) are named, and these bounds are left out; PyJLODE's own are never left out.
# Other versions, and whether the general registry has them, this does not ask.
using Pkg, TOML, UUIDs
using Pkg.Types: VersionSpec, semver_spec
using Pkg.Resolve: Graph, resolve

const Bounds = Dict{UUID,VersionSpec}

folder, root = abspath(ARGS[1]), dirname(@__DIR__)
manifest = TOML.parsefile(joinpath(folder, "Manifest.toml"))["deps"]
used = Dict(name => only(entries) for (name, entries) in manifest)

"Where the sources of a package of the manifest lie; nothing for a standard library."
function sources(name, entry)
    haskey(entry, "path") && return normpath(joinpath(folder, entry["path"]))
    haskey(entry, "git-tree-sha1") || return nothing
    id, tree = UUID(entry["uuid"]), Base.SHA1(entry["git-tree-sha1"])
    slug = Base.version_slug(id, tree)
    only(path for path in (joinpath(depot, "packages", name, slug) for depot in DEPOT_PATH) if isdir(path))
end

"What a Project.toml asks of the packages in use, by their names."
function asked(project)
    names = union(keys(get(project, "deps", Dict())), keys(get(project, "weakdeps", Dict())))
    Dict(name => semver_spec(spec) for (name, spec) in get(project, "compat", Dict())
         if name in names && haskey(used, name) && haskey(used[name], "version") && spec isa String)
end

places = Dict(name => sources(name, entry) for (name, entry) in used)
packages = Dict(name => TOML.parsefile(joinpath(place, "Project.toml")) for (name, place) in places if place !== nothing)
ours = TOML.parsefile(joinpath(root, "julia", "Project.toml"))
packages["PyJLODE"] = ours
used["PyJLODE"] = Dict("uuid" => ours["uuid"], "version" => ours["version"])
uuid(name) = UUID(used[name]["uuid"])
version(name) = VersionNumber(used[name]["version"])

available = Dict{UUID,Dict{VersionNumber,Bounds}}()
weak = Dict{UUID,Dict{VersionNumber,Set{UUID}}}()
for (name, project) in packages
    bounds = Bounds(uuid(dep) => VersionSpec() for dep in keys(get(project, "deps", Dict())) if haskey(packages, dep))
    for (dep, spec) in asked(project)
        haskey(packages, dep) || continue  # a standard library
        if version(dep) in spec || name == "PyJLODE"
            bounds[uuid(dep)] = spec
        else
            println("left out: ", name, " asks for ", dep, " ", spec, ", and ", version(dep), " is in use")
        end
    end
    available[uuid(name)] = Dict(version(name) => bounds)
    weak[uuid(name)] = Dict(version(name) => Set(uuid(dep) for dep in keys(get(project, "weakdeps", Dict()))
                                                 if haskey(packages, dep) && haskey(bounds, uuid(dep))))
end

# As juliapkg.json asks for them: PyJLODE itself, and what stands beside it.
json = read(joinpath(root, "pyjlode", "juliapkg.json"), String)
beside = Dict(String(m[1]) => semver_spec(String(m[2])) for m in eachmatch(r"\"(\w+)\":\s*\{[^}]*\"version\":\s*\"([^\"]+)\"", json))
requires = Bounds(uuid(name) => spec for (name, spec) in beside)
requires[uuid("PyJLODE")] = VersionSpec()
VERSION in semver_spec(ours["compat"]["julia"]) || error("Julia $VERSION is not within $(ours["compat"]["julia"])")

names = Dict(uuid(name) => name for name in keys(packages))
graph = Graph(available, weak, names, requires, Dict{UUID,Pkg.Resolve.Fixed}(), false, VERSION)
found = resolve(graph)
println("resolved: ", length(found), " packages, SciMLSensitivity ", found[uuid("SciMLSensitivity")])
