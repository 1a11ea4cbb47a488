from snoopi_rt.cli import main

main(prog_name="snoopi-rt")
